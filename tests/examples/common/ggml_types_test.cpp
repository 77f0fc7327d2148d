// SPDX-License-Identifier: Apache-2.0

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include <common/ggml_types.hpp>
#include <examples/common/ggml_vectors.hpp>
#include <support/catch.hpp>

using namespace prefillshare::examples;
using prefillshare::examples::test::GgmlVector;
using prefillshare::examples::test::kGgmlVectors;

namespace {

std::vector<std::byte> from_hex(std::string_view text) {
  const auto digit = [](char c) { return c <= '9' ? c - '0' : c - 'a' + 10; };
  std::vector<std::byte> out;
  for (std::size_t i = 0; i + 1 < text.size(); i += 2) {
    out.push_back(static_cast<std::byte>(16 * digit(text[i]) + digit(text[i + 1])));
  }
  return out;
}

}  // namespace

TEST_CASE("every type becomes the fp32 values that gguf-py computes", "[ggml]") {
  std::set<GgmlType> seen;
  for (const GgmlVector& vector : kGgmlVectors) {
    const GgmlTypeInfo* type = find_ggml_type(static_cast<std::uint32_t>(vector.type));
    REQUIRE(type != nullptr);
    CAPTURE(std::string(type->name));
    seen.insert(vector.type);
    const std::vector<std::byte> bytes = from_hex(vector.blocks);
    const std::vector<std::byte> expected_bytes = from_hex(vector.expected);
    REQUIRE(bytes.size() % static_cast<std::size_t>(type->block_bytes) == 0);
    const std::int64_t blocks = static_cast<std::int64_t>(bytes.size()) / type->block_bytes;
    std::vector<float> expected(expected_bytes.size() / sizeof(float));
    std::memcpy(expected.data(), expected_bytes.data(), expected_bytes.size());
    REQUIRE(static_cast<std::int64_t>(expected.size()) == blocks * type->block_elements);
    REQUIRE(blocks > 0);

    std::vector<float> got(expected.size() + 1, -12345.0F);
    type->dequantize(bytes.data(), blocks, got.data());
    CHECK(got.back() == -12345.0F);
    got.pop_back();
    // Exact: scale and code have few enough bits that their product is, whether or not the sum is fused.
    for (std::size_t i = 0; i < got.size(); ++i) {
      CAPTURE(i, got[i], expected[i]);
      REQUIRE(std::bit_cast<std::uint32_t>(got[i]) == std::bit_cast<std::uint32_t>(expected[i]));
    }

    // The bytes need no alignment.
    std::vector<std::byte> shifted(bytes.size() + 1);
    std::memcpy(shifted.data() + 1, bytes.data(), bytes.size());
    std::vector<float> again(expected.size());
    type->dequantize(shifted.data() + 1, blocks, again.data());
    CHECK(again == got);
  }
  std::size_t convertible = 0;
  for (const GgmlTypeInfo& type : kGgmlTypes) convertible += type.dequantize != nullptr ? 1U : 0U;
  CHECK(seen.size() == convertible);
}

TEST_CASE("types are found by number and named", "[ggml]") {
  CHECK(find_ggml_type(12)->name == "Q4_K");
  CHECK(find_ggml_type(16)->dequantize == nullptr);
  CHECK(find_ggml_type(4)->block_bytes == 0);
  CHECK(find_ggml_type(0xFFFFFFFFU) == nullptr);
  CHECK(convertible_ggml_types() ==
        "F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, F64, BF16");
}
