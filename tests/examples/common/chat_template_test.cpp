// SPDX-License-Identifier: Apache-2.0
//
// tests/examples/common/chat_template_test.cpp - chat templates against Jinja2, and bad templates.
// The expected texts in tests/data/chat_templates.json were made by
// tests/data/make_chat_templates.py with Jinja2 3.1.6; those written here were read off the same version.

#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/chat_template.hpp>
#include <support/catch.hpp>

using namespace prefillshare::examples;

namespace {

std::string render(const std::string& source, TemplateContext context = TemplateContext::object()) {
  CAPTURE(source);
  const Result<ChatTemplate> parsed = ChatTemplate::parse(source);
  INFO(parsed.status().message());
  REQUIRE(parsed.ok());
  const Result<std::string> text = parsed->render(std::move(context));
  INFO(text.status().message());
  REQUIRE(text.ok());
  return *text;
}

/// The failure of parsing or rendering `source`.
Status failure(const std::string& source, const TemplateLimits& limits = {}) {
  const Result<ChatTemplate> parsed = ChatTemplate::parse(source, limits);
  if (!parsed.ok()) return parsed.status();
  return parsed->render({{"n", 7}, {"l", {3, 1, 2}}, {"s", "text"}}).status();
}

}  // namespace

TEST_CASE("real chat templates give Jinja2's text") {
  const auto path = std::filesystem::path(__FILE__).parent_path() / "../../data/chat_templates.json";
  std::ifstream file(path);
  REQUIRE(file.good());
  const TemplateContext data = TemplateContext::parse(file);
  REQUIRE(data["templates"].size() >= 8);
  for (const auto& entry : data["templates"]) {
    const auto name = entry["name"].get<std::string>();
    CAPTURE(name);
    const Result<ChatTemplate> parsed = ChatTemplate::parse(entry["template"].get<std::string>());
    INFO(parsed.status().message());
    REQUIRE(parsed.ok());
    std::size_t number = 0;
    for (const auto& example : entry["cases"]) {
      CAPTURE(number);
      const Result<std::string> text = parsed->render(example["context"]);
      INFO(text.status().message());
      if (example.contains("text")) {
        REQUIRE(text.ok());
        CHECK(*text == example["text"].get<std::string>());
      } else {
        REQUIRE_FALSE(text.ok());
        CHECK(text.status().message().find(example["error"].get<std::string>()) != std::string::npos);
      }
      ++number;
    }
  }
}

TEST_CASE("the usual call passes messages, prompt flag and token texts") {
  const Result<ChatTemplate> parsed = ChatTemplate::parse(
      "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] }}{% endfor %}"
      "{{ eos_token if add_generation_prompt }}{{ tools is none }}{{ documents is none }}");
  REQUIRE(parsed.ok());
  const std::vector<ChatMessage> messages{{"user", "a {{ b }}"}, {"assistant", "c"}};
  CHECK(*parsed->render(messages, true, "<s>", "</s>") == "<s>[user]a {{ b }}[assistant]c</s>TrueTrue");
  CHECK(*parsed->render(messages, false) == "[user]a {{ b }}[assistant]cTrueTrue");
  CHECK_FALSE(parsed->render(TemplateContext::array()).ok());
}

TEST_CASE("white space around tags is cut as with trim_blocks and lstrip_blocks") {
  CHECK(render("  {% if true %}\n  a\n  {% endif %}\n b") == "  a\n b");
  CHECK(render("a\n  {%+ if true %}x{% endif +%}\n y") == "a\n  x\n y");
  CHECK(render("a  {%- if true -%}  b  {%- endif -%}  c {{- 'x' -}}  d") == "abcxd");
  CHECK(render("{# a #}\n{# b #}\n  {# c #}  {% set q=1 %}\nx") == "  x");
  CHECK(render("{{ 1 }}\n{{ 2 }}\n") == "1\n2");
  CHECK(render("a\r\n{% if true %}\rb\r\n{% endif %}") == "a\nb\n");
  CHECK(render("x {% if true %} y\n {% endif %} z") == "x  y\n z");
  CHECK(render("\xC2\xA0{%- if true -%}\xE2\x80\x83x{% endif %}") == "x");
  CHECK(render("{ % } { { #") == "{ % } { { #");
  CHECK(render("").empty());
}

TEST_CASE("expressions have Python's values") {
  CHECK(render("{{ 7//2 }} {{ -7//2 }} {{ -7%3 }} {{ 7%-3 }} {{ 7/2 }} {{ 2+3*4 }}") == "3 -4 2 -2 3.5 14");
  CHECK(render("{{ 1e16 }} {{ 0.1+0.2 }} {{ 1e-7 }} {{ 1.0 }} {{ 0.0001 }}") ==
        "1e+16 0.30000000000000004 1e-07 1.0 0.0001");
  CHECK(render("{{ 1 < 2 < 3 }} {{ true == 1 }} {{ 1 == 1.0 }} {{ 'a' ~ 1 ~ none }}") ==
        "True True True a1None");
  CHECK(render("{{ not 1 in [2] }} {{ 0 or '' or 'x' }} {{ 'y' if false }} {{ 'a' 'b' }}") == "True x  ab");
  CHECK(render("{{ 'añ日'|length }} {{ 'añ日'[::-1] }} {{ [1,2,3][-2:]|join('-') }}") == "3 日ña 2-3");
  CHECK(render("{{ 'a\\nb\\x41\\u00e9\\q' }}") == "a\nbAé\\q");
  CHECK(render("{{ ' a b '.split()|join('|') }} {{ 'a,b,c'.split(',', 1)[1] }} {{ 'xax'.strip('x') }}") ==
        "a|b b,c a");
  CHECK(render("{{ {'a': [1, 2.5, none, true], 'b': 'q\"\\n'}|tojson }}") ==
        R"({"a": [1, 2.5, null, true], "b": "q\"\n"})");
  CHECK(render("{{ {'a': {}, 'b': [1]}|tojson(indent=2) }}") == "{\n  \"a\": {},\n  \"b\": [\n    1\n  ]\n}");
  CHECK(
      render("{{ missing }}{{ missing is defined }}{{ missing|default('d') }}{{ ''|default('e', true) }}") ==
      "Falsede");
}

TEST_CASE("statements: loops, scopes, namespaces, blocks") {
  const TemplateContext context = {{"l", {3, 1, 2}}, {"d", {{"b", 1}, {"a", 2}}}};
  CHECK(render("{% for x in l %}{{ loop.index }}{{ x }}{{ ',' if not loop.last }}{% endfor %}", context) ==
        "13,21,32");
  CHECK(render("{% for k, v in d.items() %}{{ k }}{{ v }}{% endfor %}", context) == "b1a2");
  CHECK(render("{% for x in l if x > 1 %}{{ x }}/{{ loop.length }} {% else %}none{% endfor %}", context) ==
        "3/2 2/2 ");
  CHECK(render("{% for x in l %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}", context) ==
        "32");
  CHECK(render("{% for x in l %}{% if x == 1 %}{% break %}{% endif %}{{ x }}{% endfor %}", context) == "3");
  CHECK(render("{% set x = 1 %}{% for i in l %}{% set x = i %}{% endfor %}{{ x }}", context) == "1");
  CHECK(render("{% if true %}{% set x = 5 %}{% endif %}{{ x }}") == "5");
  CHECK(render("{% set ns = namespace(a=1) %}{% for i in l %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}",
               context) == "7");
  CHECK(render("{% set b %} {{ 1 }} {% endset %}[{{ b }}]{% generation %}g{% endgeneration %}") == "[ 1 ]g");
  CHECK(render("{% for x in [] %}a{% else %}e{% endfor %}{% for x in missing %}a{% else %}e{% endfor %}") ==
        "ee");
}

TEST_CASE("what is wrong or not known is named with line and column") {
  const auto check = [](const std::string& source, StatusCode code, const std::string& text) {
    CAPTURE(source);
    const Status status = failure(source);
    CHECK(status.code() == code);
    CHECK(status.message() == "chat template, " + text);
  };
  constexpr StatusCode kBad = StatusCode::kInvalidArgument, kUnknown = StatusCode::kUnsupported;
  check("a\n{{ n|nope }}", kUnknown, "line 2, column 5: filter nope is not supported");
  check("{{ n is nope }}", kUnknown, "line 1, column 6: test 'nope' is not supported");
  check("{{ s.format(1) }}", kUnknown, "line 1, column 12: method .format() of a string is not supported");
  check("{% macro f() %}{% endmacro %}", kUnknown,
        "line 1, column 4: the statement {% macro %} is not supported");
  check("{% raw %}{% endraw %}", kUnknown, "line 1, column 4: the statement {% raw %} is not supported");
  check("{{ 2 ** 3 }}", kUnknown, "line 1, column 6: the operator ** is not supported");
  check("{{ [1] }}", kUnknown, "line 1, column 4: writing a list as text without tojson is not supported");
  check("{{ '\xC3\xA9'|upper }}", kUnknown,
        "line 1, column 8: filter upper of a text beyond ASCII is not supported");
  check("{{ raise_exception('no ' ~ n) }}", kBad, "line 1, column 19: the template says: no 7");
  check("\n\n  {{ nope.x }}", kBad, "line 3, column 10: 'nope' is undefined");
  check("{{ 1 + }}", kBad, "line 1, column 8: expected an expression, found '}}'");
  check("{% if n %}", kBad, "line 1, column 11: expected {% endif %}, found the end of the template");
  check("{% endif %}", kBad, "line 1, column 4: {% endif %}, but nothing is open");
  check("{{ 'abc }}", kBad, "line 1, column 4: string without an end");
  check("{# abc", kBad, "line 1, column 1: comment without an end");
  check("{% set l.x = 1 %}", kBad,
        "line 1, column 4: cannot set 'l.x': 'l' is a list, only a namespace() can be changed");
  check("{{ 9223372036854775807 + 1 }}", kBad, "line 1, column 24: integer overflow");
  check("{{ 1 % 0 }}", kBad, "line 1, column 6: division by zero");
  check("{{ 's' + 1 }}", kBad, "line 1, column 8: cannot apply + to a string and an integer");
}

TEST_CASE("hostile templates end by the limits") {
  const auto exhausted = [](const std::string& source) {
    CAPTURE(source.substr(0, 60));
    TemplateLimits limits;
    limits.max_work = 1 << 20;
    limits.max_output = 1 << 16;
    CHECK(failure(source, limits).code() == StatusCode::kExhausted);
  };
  const auto repeat = [](std::string_view text, int times) {
    std::string out;
    for (int i = 0; i < times; ++i) out += text;
    return out;
  };
  exhausted("{% for i in range(99999999) %}{% endfor %}");
  exhausted(
      "{% for i in range(999) %}{% for j in range(999) %}{% for k in range(999) %}{% endfor %}{% endfor %}{% "
      "endfor %}");
  exhausted("{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}");
  exhausted("{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}{% endfor %}");
  exhausted("{% set n = namespace(x={}) %}{% for i in range(99) %}{% set n.x = {'a': n.x} %}{% endfor %}");
  exhausted("{{ 'a' * 99999999 }}");
  exhausted("{% set s = 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' %}{% for i in range(9999) %}{{ s }}{% endfor %}");
  // Equality of two lists that share their parts would take 2^60 steps.
  exhausted(
      "{% set a = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set a.x = [a.x, a.x] %}"
      "{% set a.y = [a.y, a.y] %}{% endfor %}{{ a.x == a.y }}");
  exhausted("{{ " + repeat("(", 500) + "1" + repeat(")", 500) + " }}");
  exhausted("{{ " + repeat("-", 5000) + "1 }}");
  exhausted("{{ " + repeat("not ", 5000) + "1 }}");
  exhausted("{{ 1" + repeat(" + 1", 5000) + " }}");
  exhausted("{{ a" + repeat(".a", 5000) + " }}");
  exhausted("{{ a" + repeat("|string", 5000) + " }}");
  exhausted("{{ " + repeat("1 if 1 else ", 5000) + "1 }}");
  exhausted(repeat("{% if true %}", 500) + repeat("{% endif %}", 500));
  TemplateLimits limits;
  limits.max_source = 10;
  CHECK(failure("more than ten bytes", limits).code() == StatusCode::kExhausted);
  // A namespace that holds itself must not leak; the sanitizers would tell.
  CHECK(render("{% set n = namespace() %}{% set n.self = [n] %}{{ n.self[0] == n }}") == "True");
}
