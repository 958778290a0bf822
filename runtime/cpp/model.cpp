#include "model.h"

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor_ptr_maker.h>
#include <executorch/runtime/platform/platform.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string_view>

#include "gori.h"

// The wheel ships the pool's library without its header; these are the two functions that are needed of it.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace gori {
namespace {

using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

// of a vocabulary and of a context; a larger one is a damaged file
constexpr int64_t kMost = 1 << 24;

// ExecuTorch narrates its start on standard error; only what went wrong is passed on.
void log(et_timestamp_t, et_pal_log_level_t level, const char* file, const char*, size_t line, const char* message, size_t) {
  if (level == kError || level == kFatal) std::fprintf(stderr, "ExecuTorch %s:%zu: %s\n", file, line, message);
}

const bool quiet = executorch::runtime::register_pal(executorch::runtime::PalImpl::create(log, __FILE__));

// Loaded programs keep a pointer to the process's one pool and a resize frees it, so the first one decides.
uint32_t set_threads(uint32_t wanted) {
  static std::mutex guard;
  static uint32_t decided = 0;
  std::lock_guard<std::mutex> lock(guard);
  if (!decided) {
    auto* pool = executorch::extension::threadpool::get_threadpool();
    decided = wanted ? wanted : 1;
    if (pool && pool->get_thread_count() != decided) pool->_unsafe_reset_threadpool(decided);
  }
  if (wanted && wanted != decided)
    throw gori::Error(
        GORI_ERROR_ARGUMENT, std::to_string(wanted) + " threads were asked for, but this process's pool has " +
                                 std::to_string(decided) + " and cannot be resized: use that many, or another process");
  return decided;
}

void check(Error error, std::string_view what) {
  if (error != Error::Ok)
    throw gori::Error(GORI_ERROR_ENGINE, std::string(what) + ": ExecuTorch says " + executorch::runtime::to_string(error));
}

}  // namespace

struct Model::Program {
  explicit Program(const std::string& path) : module(path, Module::LoadMode::Mmap) {}

  Module module;
  executorch::runtime::Method* forward = nullptr;
  std::vector<int64_t> ids;
  std::vector<int64_t> start;
  // one for each length of a chunk from 1 on, so that a step of the loop allocates nothing
  std::vector<TensorPtr> tokens;
  std::vector<EValue> tokens_values;
  // one for each number of logits' rows: the length says how many are wanted, the first element where the tokens stand
  std::vector<TensorPtr> positions;
  std::vector<EValue> positions_values;
};

Model::Model(const std::string& path, uint32_t threads) : threads_(set_threads(threads)) {
  program_ = std::make_unique<Program>(path);
  auto& p = *program_;
  check(p.module.load(), "cannot load " + path);
  vocabulary_ = constant("get_vocab_size");
  context_ = constant("get_max_context_len");
  chunk_ = constant("get_max_seq_len");
  auto methods = p.module.method_names();
  check(methods.error(), "cannot read " + path);
  if (methods->count("get_logits_rows")) rows_ = std::min(constant("get_logits_rows"), chunk_);
  check(p.module.load_method("forward"), "cannot load the program of " + path);
  // deprecated for a way of calling that makes two vectors at every step
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  auto method = p.module.method("forward");
#pragma GCC diagnostic pop
  check(method.error(), "cannot load the program of " + path);
  p.forward = method.get();
  p.ids.resize(chunk_);
  for (uint32_t count = 1; count <= chunk_; ++count) {
    p.tokens.push_back(executorch::extension::from_blob(
        p.ids.data(), {1, static_cast<executorch::aten::SizesType>(count)}, executorch::aten::ScalarType::Long));
    p.tokens_values.emplace_back(*p.tokens.back());
  }
  p.start.resize(rows_);
  for (uint32_t rows = 1; rows <= rows_; ++rows) {
    p.positions.push_back(executorch::extension::from_blob(
        p.start.data(), {static_cast<executorch::aten::SizesType>(rows)}, executorch::aten::ScalarType::Long));
    p.positions_values.emplace_back(*p.positions.back());
  }
  // the first token shows where the caches are, and wakes the kernels
  const uint32_t first = 0;
  {
    WatchCaches watch(caches_);
    step(&first, 1, 1);
  }
  length_ = 0;
  const bool kept = std::all_of(caches_.begin(), caches_.end(), [this](const Cache& c) { return c.positions >= context_; });
  if (caches_.empty() || !kept)
    throw gori::Error(
        GORI_ERROR_ENGINE, path + " keeps no keys and values for its context of " + std::to_string(context_) +
                               " tokens: it is no decoder that gori exported");
}

Model::~Model() = default;

uint32_t Model::constant(const char* name) {
  auto values = program_->module.execute(name);
  check(values.error(), std::string("the program has no ") + name);
  const bool whole = values->size() == 1 && values->at(0).isInt();
  const int64_t value = whole ? values->at(0).toInt() : 0;
  if (value < 1 || value > kMost)
    throw gori::Error(
        GORI_ERROR_ENGINE, std::string(name) + " of the program is no whole number from 1 to " + std::to_string(kMost) +
                               ": it is no decoder that gori exported");
  return static_cast<uint32_t>(value);
}

const float* Model::run(const uint32_t* ids, size_t count, size_t last) {
  if (length_ + count > context_)
    throw gori::Error(GORI_ERROR_TOO_LONG, std::to_string(length_) + " tokens are in the context and " +
                                               std::to_string(count) + " more exceed its " + std::to_string(context_) +
                                               ": shorten the utterance or export with a larger context");
  for (size_t i = 0; i < count; i += chunk_) {
    const size_t some = std::min<size_t>(chunk_, count - i);
    step(ids + i, some, i + some == count ? last : 1);
  }
  return logits_;
}

void Model::step(const uint32_t* ids, size_t count, size_t last) {
  auto& p = *program_;
  std::copy_n(ids, count, p.ids.begin());
  p.start[0] = static_cast<int64_t>(length_);
  check(p.forward->set_input(p.tokens_values[count - 1], 0), "the program does not take tokens");
  check(p.forward->set_input(p.positions_values[last - 1], 1), "the program does not take a position");
  check(p.forward->execute(), "the program does not run");
  const auto& out = p.forward->get_output(0);
  if (!out.isTensor() || out.toTensor().numel() != static_cast<ssize_t>(vocabulary_ * last) ||
      out.toTensor().scalar_type() != executorch::aten::ScalarType::Float)
    throw gori::Error(GORI_ERROR_ENGINE, "the program gives no logits of its vocabulary: export it again");
  logits_ = out.toTensor().const_data_ptr<float>();
  length_ += count;
}

std::vector<uint32_t> Model::saved(size_t length) const {
  std::vector<uint32_t> out;
  for (const auto& c : caches_) {
    const auto* from = reinterpret_cast<const uint32_t*>(c.data);
    out.insert(out.end(), from, from + length * c.width);
  }
  return out;
}

void Model::load(View<uint32_t> values, size_t length) {
  size_t needed = 0;
  for (const auto& c : caches_) needed += length * c.width;
  if (values.size != needed || length >= context_)
    throw gori::Error(GORI_ERROR_FILE, "the prefix was saved from another program: save it again");
  const uint32_t* from = values.data;
  for (const auto& c : caches_) {
    std::memcpy(c.data, from, length * c.width * sizeof(float));
    from += length * c.width;
  }
  length_ = length;
}

}  // namespace gori
