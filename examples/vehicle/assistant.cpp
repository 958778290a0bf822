#include "assistant.h"

#include <algorithm>
#include <initializer_list>
#include <utility>

namespace vehicle {
namespace {

constexpr auto kToConfirm = std::chrono::seconds(15);

// A yes is not left to a model: these texts alone confirm.
bool is_one_of(std::string_view said, std::initializer_list<std::string_view> texts) {
  while (!said.empty() && std::string_view(" .!?").find(said.back()) != std::string_view::npos) said.remove_suffix(1);
  while (!said.empty() && said.front() == ' ') said.remove_prefix(1);
  std::string lower(said);
  for (char& c : lower)
    if (c >= 'A' && c <= 'Z') c = static_cast<char>(c - 'A' + 'a');
  return std::find(texts.begin(), texts.end(), lower) != texts.end();
}

bool is_yes(std::string_view said) {
  return is_one_of(said, {"yes", "yes please", "ok", "okay", "네", "예", "응", "그래", "좋아"});
}

bool is_no(std::string_view said) {
  return is_one_of(said, {"no", "no thanks", "cancel", "아니", "아니요", "아니오", "취소"});
}

Value callback(std::string name, const char* status, std::string message, const char* mode, Array data = {}) {
  // Gleo: `data` is a JSON array of objects, as a string
  return Object{{"functionName", std::move(name)},
                {"status", status},
                {"message", std::move(message)},
                {"mode", mode},
                {"data", dump(data)}};
}

}  // namespace

std::string Assistant::answer(const std::string& utterance, std::optional<Pending>& pending) {
  const auto waiting = std::exchange(pending, std::nullopt);
  if (waiting && std::chrono::steady_clock::now() < waiting->until) {
    if (is_yes(utterance)) return dump(Array{perform({waiting->function, waiting->arguments}, true, pending)});
    if (is_no(utterance)) return dump(Array{callback(waiting->function->name, "fail", "Left as it is.", "beep")});
  }
  std::string error;
  const std::string text = ask(utterance, error);
  const auto calls = error.empty() ? parse(text) : std::nullopt;
  if (error.empty() && (!calls || !calls->array())) error = "The answer is not a list of calls.";
  if (!error.empty()) return dump(Array{callback("", "error", error, "voice")});
  return dump(act(*calls, pending));
}

std::string Assistant::ask(const std::string& utterance, std::string& error) {
  gori_result result{};
  result.size = sizeof result;
  result.text = answer_.data(), result.capacity = answer_.size();
  watch_.begin();
  const gori_status status = gori_call(handle_, utterance.c_str(), nullptr, &result);
  watch_.end();
  if (status == GORI_OK) return result.text;
  error = status == GORI_CANCELLED ? "That took too long and was given up." : gori_error();
  return "";
}

Array Assistant::act(const Value& calls, std::optional<Pending>& pending) {
  if (calls.array()->empty()) return {callback("", "fail", "The car has no function for that.", "voice")};
  // every call is checked before the first one moves anything: one bad call and nothing of the answer is done
  std::vector<Call> checked;
  Array refused;
  bool bad = false;
  for (const auto& item : *calls.array()) {
    Call call;
    Value refusal = check(item, call);
    bad |= !call.function;
    if (call.function) refusal = callback(call.function->name, "fail", "Not done: another part of it was wrong.", "silent");
    checked.push_back(std::move(call));
    refused.push_back(std::move(refusal));
  }
  if (bad) return refused;
  Array out;
  for (const auto& call : checked) out.push_back(perform(call, false, pending));
  return out;
}

// A call that the car takes as it stands, into `out`; else why not, and `out` has no function.
Value Assistant::check(const Value& item, Call& out) {
  const Value* name = item.object() ? find(*item.object(), "name") : nullptr;
  const Value* arguments = item.object() ? find(*item.object(), "arguments") : nullptr;
  const std::string called = name && name->text() ? *name->text() : "";
  const Function* f = function(called);
  if (!f) return callback(called, "error", "The car has no function " + called + ".", "voice");
  if (!arguments || !arguments->object()) return callback(called, "error", "The call has no arguments.", "voice");
  bool missing = false;
  const std::string wrong = fault(*f, *arguments->object(), missing);
  if (!wrong.empty()) return callback(called, missing ? "asking" : "error", wrong, "voice");
  out = {f, *arguments->object()};
  return {};
}

// The rule is asked anew for what was confirmed: the car may have driven off since.
Value Assistant::perform(const Call& call, bool confirmed, std::optional<Pending>& pending) {
  const Function& f = *call.function;
  Verdict verdict = f.rule(call.arguments, bus_);
  if (verdict.is == Verdict::no) return callback(f.name, "fail", verdict.why, "voice");
  if (verdict.is == Verdict::ask && !confirmed) {
    if (pending) return callback(f.name, "fail", "One question at a time: say that again afterwards.", "voice");
    pending = Pending{&f, call.arguments, std::chrono::steady_clock::now() + kToConfirm};
    return callback(f.name, "asking", verdict.why, "voice");
  }
  return send(call);
}

Value Assistant::send(const Call& call) {
  const Function& f = *call.function;
  const Plan plan = f.handler(f, call.arguments, bus_);
  for (const auto& frame : plan.frames)
    if (!bus_.send(frame)) return callback(f.name, "error", "The car did not take " + frame.message + ".", "voice");
  if (plan.data.empty()) return callback(f.name, "success", "Done.", "beep");
  return callback(f.name, "success", "Here it is.", "voice", {plan.data});
}

}  // namespace vehicle
