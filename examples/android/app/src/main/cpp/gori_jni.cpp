// The bridge from dev.gori.Native to gori.h. Texts are UTF-8 in byte arrays: JNI's own strings are a UTF-8 of their own,
// in which an emoji is six bytes.

#include <jni.h>

#include <string>
#include <vector>

#include "gori.h"

namespace {

std::string taken(JNIEnv* env, jbyteArray bytes) {
  std::string out(static_cast<size_t>(env->GetArrayLength(bytes)), '\0');
  env->GetByteArrayRegion(bytes, 0, static_cast<jsize>(out.size()), reinterpret_cast<jbyte*>(out.data()));
  return out;
}

jbyteArray given(JNIEnv* env, const char* text, size_t size) {
  jbyteArray out = env->NewByteArray(static_cast<jsize>(size));
  if (out) env->SetByteArrayRegion(out, 0, static_cast<jsize>(size), reinterpret_cast<const jbyte*>(text));
  return out;  // null: an OutOfMemoryError is on its way
}

void raise(JNIEnv* env, gori_status status) {
  const std::string why = gori_error();
  jbyteArray said = given(env, why.data(), why.size());
  jclass type = said ? env->FindClass("dev/gori/GoriException") : nullptr;
  jmethodID make = type ? env->GetMethodID(type, "<init>", "(I[B)V") : nullptr;
  jobject thrown = make ? env->NewObject(type, make, static_cast<jint>(status), said) : nullptr;
  if (thrown) env->Throw(static_cast<jthrowable>(thrown));
}

gori_session* session(jlong handle) { return reinterpret_cast<gori_session*>(handle); }

}  // namespace

extern "C" {

JNIEXPORT jlong JNICALL Java_dev_gori_Native_open(JNIEnv* env, jobject, jbyteArray directory, jint threads) {
  const gori_open_options options{sizeof(gori_open_options), threads, 1, GORI_LOOKUP_MEASURED};
  gori_session* out = nullptr;
  const gori_status status = gori_open(taken(env, directory).c_str(), &options, &out);
  if (status != GORI_OK) raise(env, status);
  return reinterpret_cast<jlong>(out);
}

JNIEXPORT jbyteArray JNICALL Java_dev_gori_Native_call(JNIEnv* env, jobject, jlong handle, jbyteArray said, jint form) {
  const std::string utterance = taken(env, said);
  const gori_call_options options{sizeof(gori_call_options), form, 0, 0.0f, 0, 1.0f, 0};
  std::vector<char> text(1 << 14);
  gori_result result{};
  result.size = sizeof result;
  result.text = text.data(), result.capacity = text.size();
  gori_status status = gori_call(session(handle), utterance.c_str(), &options, &result);
  if (status == GORI_ERROR_CAPACITY) {
    text.resize(result.length + 1);
    result.text = text.data(), result.capacity = text.size();
    status = gori_call(session(handle), utterance.c_str(), &options, &result);
  }
  if (status == GORI_OK) return given(env, result.text, result.length);
  raise(env, status);
  return nullptr;
}

JNIEXPORT void JNICALL Java_dev_gori_Native_cancel(JNIEnv*, jobject, jlong handle) { gori_cancel(session(handle)); }

JNIEXPORT void JNICALL Java_dev_gori_Native_close(JNIEnv*, jobject, jlong handle) { gori_close(session(handle)); }

}  // extern "C"
