#include "functions.h"

#include <algorithm>
#include <cmath>

namespace vehicle {
namespace {

constexpr double kStandingKmh = 3, kFastKmh = 80;

// ---- reading arguments, which `fault` has checked

std::string text(const Object& arguments, std::string_view name, const char* otherwise = "") {
  const Value* found = find(arguments, name);
  return found && found->text() ? *found->text() : otherwise;
}

double number(const Object& arguments, std::string_view name, double otherwise) {
  const Value* found = find(arguments, name);
  return found && found->number() ? *found->number() : otherwise;
}

bool flag(const Object& arguments, std::string_view name) {
  const Value* found = find(arguments, name);
  return found && found->flag() && *found->flag();
}

// ---- rules: a signal that is not known counts as the unsafe one

bool moving(const Bus& bus) { return bus.read("speed_kmh").value_or(kFastKmh) > kStandingKmh; }
bool fast(const Bus& bus) { return bus.read("speed_kmh").value_or(kFastKmh) >= kFastKmh; }

Verdict refuse(std::string why) { return {Verdict::no, std::move(why)}; }
Verdict confirm(std::string why) { return {Verdict::ask, std::move(why)}; }

Verdict always(const Object&, const Bus&) { return {}; }

Verdict standing(const Object&, const Bus& bus) {
  return moving(bus) ? refuse("That is possible only while the car stands still.") : Verdict{};
}

Verdict not_the_driver(const Object& arguments, const Bus& bus) {
  const auto seat = text(arguments, "seat", "driver");
  return seat == "driver" || seat == "all" ? standing(arguments, bus) : Verdict{};
}

Verdict no_fold(const Object& arguments, const Bus& bus) {
  return text(arguments, "action") == "fold" ? standing(arguments, bus) : Verdict{};
}

Verdict no_unlock(const Object& arguments, const Bus& bus) {
  return text(arguments, "action") == "unlock" ? standing(arguments, bus) : Verdict{};
}

Verdict no_dark(const Object& arguments, const Bus& bus) {
  return text(arguments, "mode") == "off" ? standing(arguments, bus) : Verdict{};
}

Verdict wipers(const Object& arguments, const Bus& bus) {
  const bool off = text(arguments, "mode") == "off" && text(arguments, "area", "front") == "front";
  return off && moving(bus) ? confirm("Shall I turn the wipers off while driving?") : Verdict{};
}

Verdict slow_to_open(const Object& arguments, const Bus& bus) {
  return text(arguments, "action") != "close" && fast(bus) ? confirm("The car is fast. Shall I open it?") : Verdict{};
}

Verdict handling(const Object& arguments, const Bus& bus) {
  const auto mode = text(arguments, "mode");
  const bool other = mode == "sport" || mode == "snow";
  return other && moving(bus) ? confirm("Shall I change to the drive mode " + mode + " while driving?") : Verdict{};
}

Verdict cruise(const Object& arguments, const Bus& bus) {
  if (!flag(arguments, "on")) return {};
  if (!moving(bus)) return refuse("Cruise control works only while driving.");
  const double speed = number(arguments, "speed", 0);
  return confirm("Shall I turn cruise control on" + (speed > 0 ? " at " + dump(speed) + " km/h?" : std::string("?")));
}

Verdict read_back(const Object& arguments, const Bus&) {
  return confirm("Shall I send \"" + text(arguments, "text") + "\" to " + text(arguments, "contact") + "?");
}

// ---- handlers: a call → the messages that do it

std::vector<std::string> each(const std::string& place, std::vector<std::string> all) {
  if (place == "all") return all;
  const bool has_sides = std::find(all.begin(), all.end(), "rear_left") != all.end();
  if (place == "rear" && has_sides) return {"rear_left", "rear_right"};
  return {place};
}

const std::vector<std::string> kZones = {"driver", "passenger", "rear"};
const std::vector<std::string> kSeats = {"driver", "passenger", "rear_left", "rear_right"};

// One message with the arguments as they are.
Plan as_said(const Function& f, const Object& arguments, const Bus&) { return {{{f.message, arguments}}}; }

// The same message to every place that is meant, `field` and `value` beside it.
Plan to_each(const Function& f, const char* kind, const std::vector<std::string>& places, Object fields) {
  Plan plan;
  for (const auto& place : places) {
    Object body = {{kind, place}};
    body.insert(body.end(), fields.begin(), fields.end());
    plan.frames.push_back({f.message, std::move(body)});
  }
  return plan;
}

Plan temperature(const Function& f, const Object& a, const Bus&) {
  return to_each(f, "zone", each(text(a, "zone", "all"), kZones), {{"celsius", number(a, "temperature", 0)}});
}

Plan warmer(const Function& f, const Object& a, const Bus&) {
  const double by = number(a, "degrees", 1) * (text(a, "direction") == "up" ? 1 : -1);
  return to_each(f, "zone", each(text(a, "zone", "all"), kZones), {{"by_celsius", by}});
}

Plan fan(const Function& f, const Object& a, const Bus&) {
  return to_each(f, "zone", each(text(a, "zone", "all"), kZones), {{"level", number(a, "level", 0)}});
}

Plan window(const Function& f, const Object& a, const Bus&) {
  const bool open = text(a, "action") == "open";
  const double by = number(a, "percent", 100);
  const double position = open ? by : 100 - by;
  return to_each(f, "window", each(text(a, "window", "driver"), kSeats), {{"open_percent", position}});
}

Plan sunroof(const Function& f, const Object& a, const Bus&) {
  if (text(a, "action") == "tilt") return {{{f.message, {{"tilt", true}}}}};
  const double by = number(a, "percent", 100);
  return {{{f.message, {{"open_percent", text(a, "action") == "open" ? by : 100 - by}}}}};
}

Plan seat_level(const Function& f, const Object& a, const Bus&) {
  const double level = flag(a, "on") ? number(a, "level", 2) : 0;
  return to_each(f, "seat", each(text(a, "seat", "driver"), kSeats), {{"level", level}});
}

Plan massage(const Function& f, const Object& a, const Bus&) {
  const std::string strength = flag(a, "on") ? text(a, "strength", "medium") : "off";
  return to_each(f, "seat", each(text(a, "seat", "driver"), kSeats), {{"strength", strength}});
}

Plan seat(const Function& f, const Object& a, const Bus&) {
  return to_each(f, "seat", each(text(a, "seat", "driver"), kSeats), {{"step", text(a, "direction")}});
}

Plan doors(const Function& f, const Object& a, const Bus&) {
  return to_each(f, "door", each(text(a, "door", "all"), kSeats), {{"locked", text(a, "action") == "lock"}});
}

Plan status(const Function&, const Object& a, const Bus& bus) {
  const auto item = text(a, "item");
  const auto found = bus.read(item);
  return {{}, {{"item", item}, {"value", found ? Value(*found) : Value()}}};
}

// ---- the table

using Values = std::vector<std::string_view>;
const Values kZone = {"driver", "passenger", "rear", "all"};
const Values kSeat = {"driver", "passenger", "rear_left", "rear_right", "all"};
const Values kRoute = {"fastest", "shortest", "toll_free", "no_highway", "scenic"};

Parameter one_of(const char* name, Values values) { return {name, Kind::one_of, false, 0, 0, std::move(values)}; }
Parameter whole(const char* name, double least, double most) { return {name, Kind::whole, false, least, most}; }
Parameter real(const char* name, double least, double most) { return {name, Kind::number, false, least, most}; }
Parameter on_off(const char* name) { return {name, Kind::flag}; }
Parameter words(const char* name) { return {name, Kind::text}; }
Parameter must(Parameter parameter) { return parameter.required = true, parameter; }

std::vector<Function> table() {
  const auto on = must(on_off("on"));
  const auto zone = one_of("zone", kZone), seat_of = one_of("seat", kSeat), route = one_of("route", kRoute);
  const auto place = must(words("place")), contact = words("contact");
  const auto level = whole("level", 1, 3), percent = whole("percent", 10, 90);
  const auto open_close = must(one_of("action", {"open", "close"}));
  // name, parameters, needs one, rule, message, handler
  return {
      {"SET_TEMPERATURE",
       {must(real("temperature", 17, 29)), zone}, false, always, "climate.target", temperature},
      {"ADJUST_TEMPERATURE",
       {must(one_of("direction", {"up", "down"})), whole("degrees", 1, 5), zone},
       false, always, "climate.adjust", warmer},
      {"SET_FAN_SPEED", {must(whole("level", 1, 8)), zone}, false, always, "climate.fan", fan},
      {"SET_CLIMATE_MODE",
       {must(one_of("mode", {"cool", "heat", "auto", "recirculate", "fresh_air"})), on},
       false, always, "climate.mode", as_said},
      {"SET_DEFROST", {on, one_of("area", {"front", "rear"})}, false, always, "climate.defrost", as_said},
      {"SET_WINDOW",
       {one_of("window", {"driver", "passenger", "rear_left", "rear_right", "rear", "all"}), open_close, percent},
       false, slow_to_open, "window.move", window},
      {"SET_SUNROOF",
       {must(one_of("action", {"open", "close", "tilt"})), percent}, false, slow_to_open, "sunroof.move", sunroof},
      {"SET_SEAT_HEATING", {seat_of, on, level}, false, always, "seat.heating", seat_level},
      {"SET_SEAT_VENTILATION", {seat_of, on, level}, false, always, "seat.ventilation", seat_level},
      {"SET_SEAT_MASSAGE",
       {seat_of, on, one_of("strength", {"low", "medium", "high"})}, false, always, "seat.massage", massage},
      {"MOVE_SEAT",
       {seat_of, must(one_of("direction", {"forward", "backward", "up", "down", "recline", "upright"}))},
       false, not_the_driver, "seat.move", seat},
      {"SET_STEERING_HEATER", {on}, false, always, "steering.heating", as_said},
      {"NAVIGATE", {place, route}, false, always, "navigation.start", as_said},
      {"ADD_STOP", {place}, false, always, "navigation.stop", as_said},
      {"FIND_NEARBY",
       {must(one_of("category", {"gas_station", "charging_station", "parking", "cafe", "restaurant", "restroom",
                "pharmacy", "hospital", "convenience_store", "car_wash", "rest_area"})),
        one_of("sort", {"nearest", "cheapest", "best_rated"})}, false, always, "navigation.find", as_said},
      {"CANCEL_NAVIGATION", {}, false, always, "navigation.cancel", as_said},
      {"SET_ROUTE_OPTION", {must(one_of("option", kRoute))}, false, always, "navigation.route", as_said},
      {"NAVIGATE_SAVED",
       {must(one_of("destination", {"home", "work", "school"})), route},
       false, always, "navigation.saved", as_said},
      {"PLAY_MUSIC",
       {words("song"), words("artist"), words("playlist"), on_off("shuffle")},
       false, always, "media.play", as_said},
      {"CONTROL_MEDIA",
       {must(one_of("action", {"next", "previous", "pause", "resume", "repeat"}))},
       false, always, "media.control", as_said},
      {"SET_VOLUME",
       {one_of("source", {"media", "navigation", "call", "alert"}), whole("level", 1, 30),
        one_of("change", {"up", "down", "mute"})}, true, always, "media.volume", as_said},
      {"TUNE_RADIO",
       {real("frequency", 87.5, 107.9), words("station")}, true, always, "media.radio", as_said},
      {"CALL_CONTACT",
       {must(contact), one_of("number", {"mobile", "home", "work"})}, false, always, "phone.call", as_said},
      {"SEND_MESSAGE", {must(contact), must(words("text"))}, false, read_back, "phone.send", as_said},
      {"READ_MESSAGES", {contact}, false, always, "phone.read", as_said},
      {"SET_AMBIENT_LIGHT",
       {one_of("color", {"red", "orange", "yellow", "green", "blue", "purple", "pink", "white"}),
        whole("brightness", 10, 100)}, true, always, "light.ambient", as_said},
      {"SET_HEADLIGHTS",
       {must(one_of("mode", {"on", "off", "auto", "high_beam", "low_beam"}))},
       false, no_dark, "light.head", as_said},
      {"SET_INTERIOR_LIGHT",
       {on, one_of("zone", {"front", "rear", "all"})}, false, always, "light.interior", as_said},
      {"SET_WIPERS",
       {must(one_of("mode", {"off", "slow", "fast", "auto", "on"})), one_of("area", {"front", "rear"})},
       false, wipers, "wipers.set", as_said},
      {"SET_DRIVE_MODE",
       {must(one_of("mode", {"eco", "normal", "comfort", "sport", "snow"}))},
       false, handling, "drive.mode", as_said},
      {"CONTROL_CHARGING",
       {one_of("action", {"start", "stop"}), whole("limit", 50, 100)}, true, always, "charging.control", as_said},
      {"SET_DOOR_LOCK",
       {must(one_of("action", {"lock", "unlock"})), one_of("door", kSeat)}, false, no_unlock, "door.lock", doors},
      {"SET_TRUNK",
       {must(one_of("part", {"rear", "front"})), open_close}, false, standing, "trunk.move", as_said},
      {"FOLD_MIRRORS", {must(one_of("action", {"fold", "unfold"}))}, false, no_fold, "mirror.fold", as_said},
      {"SET_CRUISE", {on, whole("speed", 30, 140)}, false, cruise, "drive.cruise", as_said},
      {"ADD_REMINDER", {must(words("text")), {"time", Kind::clock}}, false, always, "reminder.add", as_said},
      {"GET_WEATHER",
       {must(one_of("what", {"forecast", "temperature", "rain", "dust"})), words("town"),
        one_of("day", {"today", "tonight", "tomorrow", "weekend"})}, false, always, "weather.ask", as_said},
      {"GET_VEHICLE_STATUS",
       {must(one_of("item", {"battery", "range", "tire_pressure", "washer_fluid", "mileage",
                "cabin_temperature"}))}, false, always, "", status},
  };
}

bool is_clock(std::string_view text) {
  const auto digit = [&](size_t i, char most) { return text[i] >= '0' && text[i] <= most; };
  if (text.size() != 5 || text[2] != ':' || !digit(0, '2') || !digit(1, '9')) return false;
  // 29:59 has the pattern of the tools file and is no time of day
  return digit(3, '5') && digit(4, '9') && (text[0] != '2' || text[1] <= '3');
}

bool fits(const Parameter& p, const Value& value) {
  const auto* number = value.number();
  const auto* text = value.text();
  switch (p.kind) {
    case Kind::flag: return value.flag();
    case Kind::text: return text && !text->empty();
    case Kind::clock: return text && is_clock(*text);
    case Kind::one_of: return text && std::find(p.values.begin(), p.values.end(), *text) != p.values.end();
    case Kind::whole: return number && *number >= p.least && *number <= p.most && *number == std::floor(*number);
    case Kind::number: return number && *number >= p.least && *number <= p.most;
  }
  return false;
}

std::string allowed(const Parameter& p) {
  if (p.kind == Kind::whole || p.kind == Kind::number) return dump(p.least) + " to " + dump(p.most);
  if (p.kind == Kind::flag) return "true or false";
  if (p.kind == Kind::clock) return "a time of day, HH:MM";
  std::string out;
  for (const auto value : p.values) out += (out.empty() ? "" : ", ") + std::string(value);
  return out.empty() ? "a text" : "one of " + out;
}

Object schema(const Parameter& p) {
  switch (p.kind) {
    case Kind::flag: return {{"type", "boolean"}};
    case Kind::text: return {{"type", "string"}};
    case Kind::clock: return {{"type", "string"}, {"pattern", "^[0-2][0-9]:[0-5][0-9]$"}};
    case Kind::whole: return {{"type", "integer"}, {"minimum", p.least}, {"maximum", p.most}};
    case Kind::number: return {{"type", "number"}, {"minimum", p.least}, {"maximum", p.most}};
    case Kind::one_of: break;
  }
  Array values;
  for (const auto value : p.values) values.emplace_back(std::string(value));
  return {{"type", "string"}, {"enum", values}};
}

}  // namespace

const std::vector<Function>& functions() {
  static const std::vector<Function> all = table();
  return all;
}

const Function* function(std::string_view name) {
  for (const auto& f : functions())
    if (name == f.name) return &f;
  return nullptr;
}

std::string fault(const Function& f, const Object& arguments, bool& missing) {
  missing = false;
  for (const auto& [name, value] : arguments) {
    const auto named = [&, wanted = name](const Parameter& q) { return wanted == q.name; };
    const auto p = std::find_if(f.parameters.begin(), f.parameters.end(), named);
    if (p == f.parameters.end()) return std::string(f.name) + " has no argument " + name + ".";
    if (!fits(*p, value)) return name + " is " + dump(value) + ", allowed is " + allowed(*p) + ".";
  }
  for (const auto& p : f.parameters)
    if (p.required && !find(arguments, p.name))
      return missing = true, std::string(p.name) + " is missing: " + allowed(p) + ".";
  if (!f.needs_one || !arguments.empty()) return "";
  std::string names;
  for (const auto& p : f.parameters) names += (names.empty() ? "" : " or ") + std::string(p.name);
  return missing = true, names + " is missing.";
}

std::string definitions() {
  Array out;
  for (const auto& f : functions()) {
    Object properties;
    Array required;
    for (const auto& p : f.parameters) {
      properties.push_back({p.name, schema(p)});
      if (p.required) required.emplace_back(p.name);
    }
    const Object parameters = {{"type", "object"}, {"properties", properties}, {"required", required}};
    out.push_back(Object{{"type", "function"}, {"function", Object{{"name", f.name}, {"parameters", parameters}}}});
  }
  return dump(out);
}

}  // namespace vehicle
