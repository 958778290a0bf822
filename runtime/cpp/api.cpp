// The C interface: checks what callers give, turns exceptions into statuses, and lets one answer at a time through.

#include <cstring>
#include <exception>
#include <mutex>
#include <new>

#include "answer.h"
#include "gori.h"

#ifndef GORI_VERSION
#define GORI_VERSION "0"
#endif

struct gori_session {
  gori_session(const std::string& directory, const gori_open_options& options) : answerer(directory, options) {}
  gori::Answerer answerer;
  std::mutex turn;
};

namespace {

thread_local std::string failure;

gori_status fail(gori_status status, const char* what) noexcept {
  try {
    failure = what;
  } catch (...) {
  }
  return status;
}

// Runs a body whose exceptions become statuses.
template <typename Body>
gori_status guarded(Body&& body) noexcept {
  try {
    failure.clear();
    body();
    return GORI_OK;
  } catch (const gori::Error& e) {
    return fail(static_cast<gori_status>(e.status), e.what());
  } catch (const std::bad_alloc&) {
    return fail(GORI_ERROR_MEMORY, "there is not enough memory");
  } catch (const std::exception& e) {
    return fail(GORI_ERROR_INTERNAL, e.what());
  } catch (...) {
    return fail(GORI_ERROR_INTERNAL, "an unknown error");
  }
}

[[noreturn]] void refuse(const std::string& what) { throw gori::Error(GORI_ERROR_ARGUMENT, what); }

// A caller's structure, whose size tells which version of it the caller was compiled with.
template <typename T>
T taken(const T* given, const T& defaults, const char* name) {
  T out = defaults;
  if (!given) return out;
  if (given->size < sizeof(size_t) || given->size > 4096) refuse(std::string(name) + ".size is not set: sizeof it");
  std::memcpy(&out, given, std::min(given->size, sizeof(T)));
  out.size = sizeof(T);
  return out;
}

gori_call_options checked(const gori_call_options* given, gori_form form) {
  const auto o = taken(given, {sizeof(gori_call_options), form, 0, 0.0f, 0, 1.0f, 0}, "gori_call_options");
  if (o.form < GORI_FORM_CALLS || o.form > GORI_FORM_TEXT) refuse("form " + std::to_string(o.form) + ": 0, 1 and 2 are known");
  if (o.most < 0 || o.most == 1) refuse("most is " + std::to_string(o.most) + ": 2 or more tokens, or 0 for 256");
  if (!(o.temperature >= 0) || o.top_k < 0 || !(o.top_p >= 0 && o.top_p <= 1))
    refuse("temperature and top_k are 0 or more, top_p is 0 to 1");
  return o;
}

gori_status answer(
    gori_session* handle, const char* utterance, const gori_call_options* options, gori_form form, const gori::OnText& on_text,
    gori_result* out, bool need_buffer) {
  return guarded([&] {
    if (!handle || !utterance || !out) refuse("handle, utterance and result must not be null");
    if (out->size != sizeof(gori_result)) refuse("gori_result.size is not set: sizeof it");
    if (need_buffer && (!out->text || !out->capacity)) refuse("gori_result.text needs a buffer");
    const auto o = checked(options, form);
    std::lock_guard<std::mutex> lock(handle->turn);
    out->length = 0;
    if (out->text && out->capacity) out->text[0] = 0;
    handle->answerer.answer(utterance, o, on_text, *out);
    const auto& text = handle->answerer.text();
    out->length = text.size();
    if (!out->text) return;
    if (text.size() >= out->capacity)
      throw gori::Error(GORI_ERROR_CAPACITY, "the answer has " + std::to_string(text.size()) + " bytes and a NUL, the buffer " +
                                                 std::to_string(out->capacity));
    std::memcpy(out->text, text.c_str(), text.size() + 1);
  });
}

}  // namespace

extern "C" {

const char* gori_version(void) { return GORI_VERSION; }

const char* gori_error(void) { return failure.c_str(); }

gori_status gori_open(const char* directory, const gori_open_options* options, gori_session** out) {
  return guarded([&] {
    if (!directory || !out) refuse("directory and out must not be null");
    *out = nullptr;
    const auto o = taken(options, {sizeof(gori_open_options), 0, 1, GORI_LOOKUP_MEASURED}, "gori_open_options");
    if (o.threads < 0 || o.threads > 1024) refuse("threads are 0 to 1024");
    if (o.lookup < GORI_LOOKUP_MEASURED || o.lookup > GORI_LOOKUP_NEVER) refuse("lookup is 0, 1 or 2");
    *out = new gori_session(directory, o);
  });
}

void gori_close(gori_session* handle) { delete handle; }

gori_status gori_describe(gori_session* handle, gori_facts* out) {
  return guarded([&] {
    if (!handle || !out || out->size != sizeof(gori_facts)) refuse("handle and facts must be there, and facts' size be set");
    handle->answerer.describe(*out);
  });
}

gori_status gori_call(gori_session* handle, const char* utterance, const gori_call_options* options, gori_result* out) {
  return answer(handle, utterance, options, GORI_FORM_CALLS, {}, out, true);
}

gori_status gori_stream(
    gori_session* handle, const char* utterance, const gori_call_options* options, gori_on_text on_text, void* user,
    gori_result* out) {
  if (!on_text) return guarded([] { refuse("on_text must not be null"); });
  return answer(
      handle, utterance, options, GORI_FORM_TEXT,
      [on_text, user](std::string_view text) { return on_text(user, text.data(), text.size()) == 0; }, out, false);
}

void gori_cancel(gori_session* handle) {
  if (handle) handle->answerer.cancelled = true;
}

gori_status gori_tokens(gori_session* handle, const char* text, size_t bytes, uint32_t* ids, size_t capacity, size_t* count) {
  return guarded([&] {
    if (!handle || !text || !count || (capacity && !ids)) refuse("handle, text, ids and count must not be null");
    std::vector<uint32_t> found;
    handle->answerer.tokenizer().encode({text, bytes}, found);
    *count = found.size();
    std::copy_n(found.begin(), std::min(capacity, found.size()), ids);
    if (found.size() > capacity) throw gori::Error(GORI_ERROR_CAPACITY, std::to_string(found.size()) + " tokens");
  });
}

gori_status gori_save_prefix(gori_session* handle, const char* path) {
  return guarded([&] {
    if (!handle || !path) refuse("handle and path must not be null");
    std::lock_guard<std::mutex> lock(handle->turn);
    handle->answerer.save_prefix(path);
  });
}

}  // extern "C"
