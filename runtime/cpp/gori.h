/* gori's runner: an exported artifact answers utterances with function calls, without Python.
 *
 * A plain C interface: no exception crosses it, every function returns a status, and gori_error() says what went wrong, in
 * one sentence, for the calling thread. A handle may be used by several threads, one answer at a time: a second waits.
 * After a thread's first answer nothing is allocated while tokens are made, but for what XNNPACK plans anew (and frees)
 * where a step reads another number of tokens than the one before: once when the prompt is read, once behind it.
 */
#ifndef GORI_H
#define GORI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define GORI_API __attribute__((visibility("default")))

typedef enum gori_status {
  GORI_OK = 0,
  GORI_ERROR_ARGUMENT = 1,  /* a null pointer, an option out of range */
  GORI_ERROR_FILE = 2,      /* a file is missing, damaged or of another version */
  GORI_ERROR_ENGINE = 3,    /* ExecuTorch refused the program or failed to run it */
  GORI_ERROR_TOO_LONG = 4,  /* the utterance leaves no room in the context */
  GORI_ERROR_NO_CALL = 5,   /* the model was not trained on calls: it has no grammar */
  GORI_ERROR_CAPACITY = 6,  /* the caller's buffer is too small; `length` says what is needed */
  GORI_CANCELLED = 7,
  GORI_ERROR_MEMORY = 8,
  GORI_ERROR_INTERNAL = 9
} gori_status;

typedef enum gori_form {
  GORI_FORM_CALLS = 0, /* [{"name": …, "arguments": {…}}, …], [] where no function fits */
  GORI_FORM_GLEO = 1,  /* [{"packageName": …, "action": …, "actionParameters": {…}}, …] */
  GORI_FORM_TEXT = 2   /* what the model says, unconstrained; special tokens are left out */
} gori_form;

/* Whether tokens that were said are read ahead as guesses while a value is copied (prompt lookup). Answers do not change. */
typedef enum gori_lookup {
  GORI_LOOKUP_MEASURED = 0, /* while it pays: measured at every answer */
  GORI_LOOKUP_ALWAYS = 1,
  GORI_LOOKUP_NEVER = 2
} gori_lookup;

typedef struct gori_session gori_session;

typedef struct gori_open_options {
  size_t size;        /* sizeof(gori_open_options) */
  int32_t threads;    /* of the process's one pool; 0: 1. The first handle of a process decides */
  int32_t use_prefix; /* 0: do not read prefix.bin */
  int32_t lookup;     /* gori_lookup; 0 while it pays */
} gori_open_options;

typedef struct gori_call_options {
  size_t size;        /* sizeof(gori_call_options) */
  int32_t form;       /* gori_form */
  int32_t most;       /* tokens of the answer, its end mark among them; 0: 256 */
  float temperature;  /* 0: the likeliest token each time */
  int32_t top_k;      /* sample from so many; 0: all */
  float top_p;        /* sample from the smallest set of this probability; 0: 1 */
  uint64_t seed;
} gori_call_options;

typedef struct gori_result {
  size_t size;            /* sizeof(gori_result) */
  char *text;             /* the caller's buffer: UTF-8, NUL-terminated */
  size_t capacity;        /* bytes of it */
  size_t length;          /* bytes of the answer without the NUL, also where they did not fit */
  uint32_t prompt_tokens; /* those that a prefix held are among them */
  uint32_t prefix_tokens; /* taken from the prefix, not computed */
  uint32_t answer_tokens; /* the end mark among them */
  uint32_t forced_tokens; /* known without asking the model */
  uint32_t guessed_tokens;   /* read ahead */
  uint32_t confirmed_tokens; /* of them those that came */
  double first_token_ms;  /* until the first token was chosen */
  double total_ms;
} gori_result;

typedef struct gori_facts {
  size_t size; /* sizeof(gori_facts) */
  uint32_t vocabulary, context, chunk, threads, functions, prefix_tokens;
} gori_facts;

/* A piece of the answer; `text` is whole characters and not NUL-terminated. Non-zero stops: GORI_CANCELLED. */
typedef int32_t (*gori_on_text)(void *user, const char *text, size_t length);

GORI_API const char *gori_version(void);

/* What the last call of this thread that failed said; empty after none. Valid until the thread's next call. */
GORI_API const char *gori_error(void);

/* Opens a directory that gori exported for ExecuTorch: model.pte and runner.bin. `options` may be null. */
GORI_API gori_status gori_open(const char *directory, const gori_open_options *options, gori_session **out);

/* Frees the handle; no other thread may be using it. Null is allowed. */
GORI_API void gori_close(gori_session *handle);

GORI_API gori_status gori_describe(gori_session *handle, gori_facts *out);

/* Answers one utterance. Bytes of it that are not UTF-8 are read as U+FFFD. `options` may be null. */
GORI_API gori_status gori_call(gori_session *handle, const char *utterance, const gori_call_options *options, gori_result *out);

/* The same with GORI_FORM_TEXT as default, and each piece handed over as soon as it is whole; `out` may have no buffer. */
GORI_API gori_status gori_stream(gori_session *handle, const char *utterance, const gori_call_options *options,
                                 gori_on_text on_text, void *user, gori_result *out);

/* Any thread: the answer that is being made ends with GORI_CANCELLED at its next token. Later answers are not touched. */
GORI_API void gori_cancel(gori_session *handle);

/* The tokens of a text; `count` is how many there are, also where they did not fit. */
GORI_API gori_status gori_tokens(gori_session *handle, const char *text, size_t bytes, uint32_t *ids, size_t capacity, size_t *count);

/* Computes what stands before every utterance and writes its keys and values to a file that gori_open reads as
 * prefix.bin of the directory. */
GORI_API gori_status gori_save_prefix(gori_session *handle, const char *path);

#ifdef __cplusplus
}
#endif

#endif
