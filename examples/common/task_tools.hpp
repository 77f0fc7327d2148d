// SPDX-License-Identifier: Apache-2.0
//
// common/task_tools.hpp - requests and the tool call that serves each, as JSON; name and arguments are
// judged.
// Layer: examples (host only).
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <common/task.hpp>

namespace prefillshare::examples {

namespace detail {

inline constexpr const char* kCities[] = {"Lisbon", "Oslo",   "Kyoto",  "Quito",  "Tartu", "Cork",
                                          "Turin",  "Bergen", "Lyon",   "Dakar",  "Perth", "Graz",
                                          "Porto",  "Riga",   "Malaga", "Zurich", "Izmir", "Hobart"};
inline constexpr const char* kDays[] = {"Monday", "Tuesday",  "Wednesday", "Thursday",
                                        "Friday", "Saturday", "Sunday"};
inline constexpr const char* kRooms[] = {"kitchen", "bedroom", "office", "hall",
                                         "garage",  "cellar",  "attic",  "nursery"};
inline constexpr const char* kGuests[] = {"Mara", "Jonas", "Ines",  "Pavel", "Lena",  "Tariq",
                                          "Nora", "Bruno", "Priya", "Oskar", "Clara", "Idris"};
inline constexpr const char* kLabels[] = {"pasta",   "laundry", "tea",   "bread", "workout",
                                          "parking", "eggs",    "paint", "nap",   "homework"};
inline constexpr const char* kGoods[] = {"batteries", "notebooks", "candles", "mugs",    "towels",
                                         "lamps",     "pillows",   "pens",    "filters", "screws"};
inline constexpr const char* kModes[] = {"train", "car", "bicycle", "bus"};
inline constexpr const char* kMoney[] = {"euro", "yen", "krone", "peso", "franc", "dollar"};
inline constexpr const char* kNumbers[] = {"two",   "three", "four", "five", "six",
                                           "seven", "eight", "nine", "ten"};  // from 2

/// What a tool is called and takes, and ways to ask for it.
struct ToolText {
  const char* name;
  const char* signature;
  const char* requests[3];
};
inline constexpr ToolText kTools[] = {
    {"set_timer",
     "minutes, label",
     {"Start a timer of {n} minutes for the {label}.", "Remind me about the {label} in {n} minutes.",
      "The {label} needs {n} minutes, keep the time for me."}},
    {"get_weather",
     "city, day",
     {"What will the weather be in {city} on {day}?", "Do I need an umbrella in {city} this {day}?",
      "Tell me {day}'s forecast for {city}."}},
    {"book_table",
     "people, day, hour",
     {"Book a table for {n} people on {day} at {time}.",
      "On {day} at {time} we would like to eat out, {n} of us.",
      "Reserve dinner for {n} this {day}, {time}."}},
    {"find_route",
     "start, goal, mode",
     {"How do I get from {city} to {city2} by {mode}?",
      "I am going to {city2} by {mode} and leave from {city}.", "Plan a trip by {mode}, {city} to {city2}."}},
    {"set_heating",
     "room, degrees",
     {"Make the {room} {n} degrees warm.", "Set the heating in the {room} to {n}.",
      "I want it to be {n} degrees in the {room}."}},
    {"order_goods",
     "item, count",
     {"Order {n} {goods}.", "We are out of {goods}, please get {n}.", "Buy {n} new {goods} for us."}},
    {"plan_meeting",
     "person, day, hour",
     {"Plan a meeting with {who} on {day} at {time}.", "I must see {who} at {time} on {day}.",
      "Put {who} into my calendar, {day}, {time}."}},
    {"switch_light",
     "room, on",
     {"Turn {state} the light in the {room}.", "The light in the {room} should be {state}.",
      "Switch the {room} light {state}."}},
    {"convert_money",
     "amount, source, goal",
     {"How much is {n} {money} in {money2}?", "Change {n} {money} into {money2}.",
      "I have {n} {money}, what is that in {money2}?"}},
    {"set_alarm",
     "day, hour",
     {"Wake me at {time} on {day}.", "I have to get up at {time} this {day}.",
      "Set an alarm for {day}, {time}."}},
    {"send_invoice",
     "person, amount",
     {"Send {who} an invoice for {n}.", "{who} owes us {n}, write the invoice.", "Bill {who} for {n}."}},
    {"play_radio",
     "room, volume",
     {"Play the radio in the {room} at volume {n}.", "Radio on in the {room}, volume {n}.",
      "I want to hear the radio in the {room}, loudness {n}."}},
};

}  // namespace detail

/// Four tools and a request for one of them; the target is {"name": "set_timer", "arguments": {...}}.
[[nodiscard]] inline TaskItem make_tool_call(TaskRandom& random) {
  std::vector<std::size_t> shown;
  while (shown.size() < 4) {
    const auto tool = static_cast<std::size_t>(random.next() % std::size(detail::kTools));
    if (std::find(shown.begin(), shown.end(), tool) == shown.end()) shown.push_back(tool);
  }
  const detail::ToolText& tool = detail::kTools[shown[random.next() % shown.size()]];
  const std::string name = tool.name;

  // All that a request may name is drawn, whether it does or not.
  const std::string city = random.pick(detail::kCities);
  std::string city2 = random.pick(detail::kCities);
  while (city2 == city) city2 = random.pick(detail::kCities);
  const std::string money = random.pick(detail::kMoney);
  std::string money2 = random.pick(detail::kMoney);
  while (money2 == money) money2 = random.pick(detail::kMoney);
  const std::string day = random.pick(detail::kDays);
  const std::string room = random.pick(detail::kRooms);
  const std::string who = random.pick(detail::kGuests);
  const std::string label = random.pick(detail::kLabels);
  const std::string goods = random.pick(detail::kGoods);
  const std::string mode = random.pick(detail::kModes);
  const bool on = random.chance(50);
  const int hour = random.between(1, 23);
  const bool by_twelve = hour != 12 && random.chance(60);
  const std::string time = !by_twelve  ? codegemm::concat(hour, ":00")
                           : hour > 12 ? codegemm::concat(hour - 12, " pm")
                                       : codegemm::concat(hour, " am");
  int low = 2;
  int high = 90;
  if (name == "book_table") high = 12;
  if (name == "play_radio") high = 30;
  if (name == "set_heating") {
    low = 14;
    high = 28;
  }
  if (name == "convert_money" || name == "send_invoice") {
    low = 15;
    high = 999;
  }
  const int n = random.between(low, high);
  const bool in_words = n >= 2 && n <= 10 && random.chance(60);
  const std::string number = in_words ? detail::kNumbers[n - 2] : std::to_string(n);
  const char* const text = random.pick(tool.requests);

  nlohmann::ordered_json arguments;
  if (name == "set_timer") arguments = {{"minutes", n}, {"label", label}};
  if (name == "get_weather") arguments = {{"city", city}, {"day", day}};
  if (name == "book_table") arguments = {{"people", n}, {"day", day}, {"hour", hour}};
  if (name == "find_route") arguments = {{"start", city}, {"goal", city2}, {"mode", mode}};
  if (name == "set_heating") arguments = {{"room", room}, {"degrees", n}};
  if (name == "order_goods") arguments = {{"item", goods}, {"count", n}};
  if (name == "plan_meeting") arguments = {{"person", who}, {"day", day}, {"hour", hour}};
  if (name == "switch_light") arguments = {{"room", room}, {"on", on}};
  if (name == "convert_money") arguments = {{"amount", n}, {"source", money}, {"goal", money2}};
  if (name == "set_alarm") arguments = {{"day", day}, {"hour", hour}};
  if (name == "send_invoice") arguments = {{"person", who}, {"amount", n}};
  if (name == "play_radio") arguments = {{"room", room}, {"volume", n}};

  TaskItem item;
  item.prompt = "Tools:";
  for (const std::size_t i : shown)
    item.prompt += codegemm::concat(" ", detail::kTools[i].name, "(", detail::kTools[i].signature, ")");
  item.prompt +=
      "\nCall one with JSON: {\"name\": ..., \"arguments\": {...}}. Hours are 0 to 23.\nRequest: " +
      fill(text, {{"n", number},
                  {"label", label},
                  {"city", city},
                  {"city2", city2},
                  {"day", day},
                  {"time", time},
                  {"mode", mode},
                  {"room", room},
                  {"goods", goods},
                  {"who", who},
                  {"state", on ? "on" : "off"},
                  {"money", money},
                  {"money2", money2}});
  std::string written;  // with the spaces that people put
  for (const auto& [key, value] : arguments.items()) {
    written += codegemm::concat(written.empty() ? "" : ", ", "\"", key, "\": ", value.dump());
  }
  item.target = codegemm::concat("{\"name\": \"", name, "\", \"arguments\": {", written, "}}");
  return item;
}

/// What lies between the first brace and the last is one JSON object with the members name and arguments, no
/// others, and both are those of the target. The order of members does not count, the kinds of values do.
[[nodiscard]] inline bool judge_tool_call(const std::string& target, const std::string& answer) {
  using Json = nlohmann::json;
  const std::size_t first = answer.find('{');
  const std::size_t last = answer.rfind('}');
  if (first == std::string::npos || last == std::string::npos || last < first) return false;
  bool doubled = false;  // a member given twice says two things
  std::vector<std::vector<std::string>> open;
  const Json::parser_callback_t watch = [&](int, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) open.emplace_back();
    if (event == Json::parse_event_t::object_end) open.pop_back();
    if (event == Json::parse_event_t::key) {
      const auto key = parsed.get<std::string>();
      doubled = doubled || std::find(open.back().begin(), open.back().end(), key) != open.back().end();
      open.back().push_back(key);
    }
    return true;
  };
  if (std::count(answer.begin(), answer.end(), '{') > 64) return false;  // no deep nesting
  const Json call = Json::parse(answer.substr(first, last - first + 1), watch, false);
  const Json right = Json::parse(target, nullptr, false);
  if (doubled || !call.is_object() || !right.is_object() || call.size() != 2) return false;
  if (!call.contains("name") || !call.contains("arguments")) return false;
  const Json& arguments = call["arguments"];
  const Json& wanted = right["arguments"];
  if (call["name"] != right["name"] || !arguments.is_object() || arguments.size() != wanted.size())
    return false;
  for (const auto& [key, value] : wanted.items()) {
    const auto at = arguments.find(key);
    if (at == arguments.end() || *at != value || at->is_number_float()) return false;
  }
  return true;
}

}  // namespace prefillshare::examples
