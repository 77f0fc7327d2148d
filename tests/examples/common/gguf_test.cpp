// SPDX-License-Identifier: Apache-2.0

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <codegemm/io/temporary_folder.hpp>
#include <common/gguf.hpp>
#include <examples/common/gguf_builder.hpp>
#include <support/catch.hpp>

using namespace prefillshare::examples;
using namespace prefillshare::examples::test;
using namespace codegemm::test;

namespace {

/// Metadata of every type and a few tensors, with no byte at the end that could be missing.
GgufBuilder full_file() {
  GgufBuilder builder;
  builder.string("general.architecture", "llama")
      .u32("general.alignment", 32)
      .entry("u8", GgufType::kUint8, raw<std::uint8_t>(200))
      .entry("i8", GgufType::kInt8, raw<std::int8_t>(-5))
      .entry("u16", GgufType::kUint16, raw<std::uint16_t>(60000))
      .entry("i16", GgufType::kInt16, raw<std::int16_t>(-300))
      .u32("u32", 4'000'000'000U)
      .entry("i32", GgufType::kInt32, raw<std::int32_t>(-70000))
      .f32("f32", 1.5F)
      .boolean("yes", true)
      .boolean("no", false)
      .entry("u64", GgufType::kUint64, raw<std::uint64_t>(1ULL << 40))
      .entry("huge", GgufType::kUint64, raw<std::uint64_t>(~0ULL))
      .entry("i64", GgufType::kInt64, raw<std::int64_t>(-(1LL << 40)))
      .entry("f64", GgufType::kFloat64, raw(0.1))
      .strings("tokens", {"<s>", "", "\xc4\xa0the"})
      .entry("types", GgufType::kArray,
             GgufBuilder::array(GgufType::kInt32, 3) + raw<std::int32_t>(3) + raw<std::int32_t>(-1) +
                 raw<std::int32_t>(7))
      .entry("scores", GgufType::kArray, GgufBuilder::array(GgufType::kFloat32, 2) + raw(0.25F) + raw(-2.0F))
      .entry("flags", GgufType::kArray, GgufBuilder::array(GgufType::kBool, 2) + std::string("\x01\x00", 2))
      .entry("empty", GgufType::kArray, GgufBuilder::array(GgufType::kFloat64, 0))
      .entry("nested", GgufType::kArray,
             GgufBuilder::array(GgufType::kArray, 2) + GgufBuilder::array(GgufType::kUint8, 2) + "\x05\x06" +
                 GgufBuilder::array(GgufType::kString, 1) + raw_string("deep"));
  const std::vector<float> norm{1.0F, -2.0F, 3.0F};
  builder.tensor("norm", {3}, norm);
  std::string q8;  // two rows of two blocks
  for (int block = 0; block < 4; ++block) {
    q8 += raw(codegemm::Half::from_float(0.5F * static_cast<float>(block + 1)));
    for (int i = 0; i < 32; ++i) q8 += raw(static_cast<std::int8_t>(i - 16));
  }
  builder.tensor("q8", {64, 2}, 8, q8);
  const std::vector<float> cube{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
  builder.tensor("cube", {2, 3, 2}, cube);
  return builder;
}

Result<GgufFile> parse(const std::vector<std::byte>& bytes) { return GgufFile::parse(bytes, "test.gguf"); }

/// Touches everything that a parsed file offers. Whether all that it promises to convert was converted.
bool usable(const GgufFile& file) {
  bool good = true;
  for (const GgufEntry& entry : file.metadata()) {
    const GgufValue& value = entry.value;
    good = good && !value.describe().empty() && file.find(entry.name) == &value;
    if (value.type() != GgufType::kArray) continue;
    if (value.element_type() == GgufType::kString) {
      good = good && value.as_strings().has_value() && value.as_strings()->size() == value.count();
    } else if (value.element_type() == GgufType::kArray) {
      good = good && value.as_arrays().has_value() && value.as_arrays()->size() == value.count();
    } else if (value.element_type() != GgufType::kBool) {
      good = good && value.as_numbers().has_value() && value.as_numbers()->size() == value.count();
    }
  }
  for (const GgufTensor& tensor : file.tensors()) {
    std::vector<float> row(static_cast<std::size_t>(tensor.row_elements()));
    for (std::int64_t r = 0; r < tensor.rows(); ++r) {
      good = good && file.read_rows(tensor, r, 1, row.data()).ok() == (tensor.type->dequantize != nullptr);
    }
  }
  return good;
}

}  // namespace

TEST_CASE("metadata of every type are read as what they are", "[gguf]") {
  const std::vector<std::byte> bytes = exact_bytes(full_file().build());
  const Result<GgufFile> file = parse(bytes);
  CAPTURE(file.status().message());
  REQUIRE(file.ok());
  CHECK(file->version() == 3);
  CHECK(file->alignment() == 32);
  CHECK(*file->string("general.architecture") == "llama");
  CHECK(*file->integer("u8") == 200);
  CHECK(*file->integer("i8") == -5);
  CHECK(*file->integer("u16") == 60000);
  CHECK(*file->integer("i16") == -300);
  CHECK(*file->integer("u32") == 4'000'000'000);
  CHECK(*file->integer("i32") == -70000);
  CHECK(*file->integer("u64") == (1LL << 40));
  CHECK(*file->integer("i64") == -(1LL << 40));
  CHECK(*file->number("f32") == 1.5);
  CHECK(*file->number("f64") == 0.1);
  CHECK(*file->number("i8") == -5.0);
  CHECK(*file->number("huge") == 18446744073709551616.0);
  CHECK(*file->boolean("yes"));
  CHECK_FALSE(*file->boolean("no"));
  CHECK(*file->strings("tokens") == std::vector<std::string_view>{"<s>", "", "\xc4\xa0the"});
  CHECK(*file->integers("types") == std::vector<std::int64_t>{3, -1, 7});
  CHECK(*file->numbers("scores") == std::vector<float>{0.25F, -2.0F});
  CHECK(file->numbers("empty")->empty());
  const auto inner = file->find("nested")->as_arrays();
  REQUIRE(inner.has_value());
  REQUIRE(inner->size() == 2);
  CHECK(*(*inner)[0].as_integers() == std::vector<std::int64_t>{5, 6});
  CHECK(*(*inner)[1].as_strings() == std::vector<std::string_view>{"deep"});
  // Strings are views into the bytes given.
  const char* text = file->string("general.architecture")->data();
  CHECK(text > reinterpret_cast<const char*>(bytes.data()));
  CHECK(text < reinterpret_cast<const char*>(bytes.data() + bytes.size()));
}

TEST_CASE("a metadata value that is missing or of another type is named", "[gguf]") {
  const std::vector<std::byte> bytes = exact_bytes(full_file().build());
  const Result<GgufFile> file = parse(bytes);
  REQUIRE(file.ok());
  CHECK(file->find("absent") == nullptr);
  CHECK(file->integer("absent").status().code() == StatusCode::kNotFound);
  CHECK(file->integer("absent").status().message() == "test.gguf: metadata 'absent' is missing");
  CHECK(file->integer("f32").status().code() == StatusCode::kCorruptData);
  CHECK(file->integer("f32").status().message() ==
        "test.gguf: metadata 'f32' is the float32 1.5, expected an integer below 2^63");
  CHECK(contains(file->integer("huge").status().message(), "is the uint64 18446744073709551615"));
  CHECK(contains(file->string("yes").status().message(), "is the bool true, expected a string"));
  CHECK(contains(file->strings("types").status().message(),
                 "is an array of 3 int32, expected an array of strings"));
  CHECK(contains(file->number("general.architecture").status().message(),
                 "is the string 'llama', expected a number"));
  CHECK_FALSE(file->integers("scores").ok());
  CHECK_FALSE(file->boolean("u8").ok());
  CHECK_FALSE(file->numbers("flags").ok());
}

TEST_CASE("tensors are found by name and read row by row", "[gguf]") {
  const std::vector<std::byte> bytes = exact_bytes(full_file().build());
  const Result<GgufFile> file = parse(bytes);
  REQUIRE(file.ok());
  REQUIRE(file->tensors().size() == 3);
  CHECK(file->find_tensor("absent") == nullptr);

  const GgufTensor* norm = file->find_tensor("norm");
  REQUIRE(norm != nullptr);
  CHECK(norm->rows() == 1);
  std::vector<float> out(3);
  REQUIRE(file->read_rows(*norm, 0, 1, out.data()).ok());
  CHECK(out == std::vector<float>{1.0F, -2.0F, 3.0F});

  const GgufTensor* q8 = file->find_tensor("q8");
  REQUIRE(q8 != nullptr);
  CHECK(q8->type->name == "Q8_0");
  CHECK(q8->row_elements() == 64);
  CHECK(q8->rows() == 2);
  out.assign(64, 0.0F);
  REQUIRE(file->read_rows(*q8, 1, 1, out.data()).ok());
  CHECK(out[0] == -16 * 1.5F);
  CHECK(out[31] == 15 * 1.5F);
  CHECK(out[32] == -16 * 2.0F);

  const GgufTensor* cube = file->find_tensor("cube");
  REQUIRE(cube != nullptr);
  CHECK(cube->rows() == 6);
  out.assign(4, 0.0F);
  REQUIRE(file->read_rows(*cube, 2, 2, out.data()).ok());
  CHECK(out == std::vector<float>{5, 6, 7, 8});

  CHECK(file->read_rows(*q8, 2, 0, nullptr).ok());
  for (const auto& [first, count] : std::vector<std::pair<std::int64_t, std::int64_t>>{
           {0, 3}, {2, 1}, {3, 0}, {-1, 1}, {0, -1}, {1, INT64_MAX}, {INT64_MAX, INT64_MAX}}) {
    CAPTURE(first, count);
    const Status status = file->read_rows(*q8, first, count, out.data());
    CHECK(status.code() == StatusCode::kInvalidArgument);
    CHECK(contains(status.message(), "tensor 'q8' has 2 rows"));
  }
}

TEST_CASE("version 2 and another alignment are read", "[gguf]") {
  GgufBuilder builder;
  builder.version = 2;
  builder.alignment = 256;
  builder.u32("general.alignment", 256);
  const std::vector<float> one{1.0F};
  const std::vector<float> two{2.0F};
  builder.tensor("a", {1}, one).tensor("b", {}, two);
  const std::vector<std::byte> bytes = exact_bytes(builder.build());
  const Result<GgufFile> file = parse(bytes);
  CAPTURE(file.status().message());
  REQUIRE(file.ok());
  CHECK(file->version() == 2);
  CHECK(file->find_tensor("a")->offset % 256 == 0);
  CHECK(file->find_tensor("b")->offset == file->find_tensor("a")->offset + 256);
  CHECK(file->find_tensor("b")->rank == 0);
  float out = 0.0F;
  REQUIRE(file->read_rows(*file->find_tensor("b"), 0, 1, &out).ok());
  CHECK(out == 2.0F);
}

TEST_CASE("a GGUF file cut at any byte is refused", "[gguf]") {
  const std::string whole = full_file().build();
  REQUIRE(parse(exact_bytes(whole)).ok());
  for (std::size_t size = 0; size < whole.size(); ++size) {
    CAPTURE(size);
    const std::vector<std::byte> bytes = exact_bytes(std::string_view(whole).substr(0, size));
    const Result<GgufFile> file = parse(bytes);
    REQUIRE_FALSE(file.ok());
    CHECK(file.status().code() == StatusCode::kCorruptData);
    CHECK(contains(file.status().message(), "test.gguf: "));
  }
}

TEST_CASE("no change of a single byte of a GGUF file gets past the checks into bad memory", "[gguf]") {
  const std::string whole = full_file().build();
  int refused = 0;
  int accepted = 0;
  for (std::size_t at = 0; at < whole.size(); ++at) {
    for (const int change : {0x01, 0x04, 0x10, 0x80, 0xFF}) {
      std::string text = whole;
      text[at] = static_cast<char>(text[at] ^ change);
      const std::vector<std::byte> bytes = exact_bytes(text);
      const Result<GgufFile> file = parse(bytes);
      if (file.ok()) {
        REQUIRE(usable(*file));
        ++accepted;
      } else {
        REQUIRE_FALSE(file.status().message().empty());
        ++refused;
      }
    }
  }
  CHECK(refused > 500);
  CHECK(accepted > 500);  // changes of data and names
}

TEST_CASE("GGUF files that contradict the format are refused with names and numbers", "[gguf]") {
  struct Case {
    std::string bytes;
    StatusCode code;
    const char* message;
  };
  const StatusCode corrupt = StatusCode::kCorruptData;
  const StatusCode unsupported = StatusCode::kUnsupported;
  const auto array = [](GgufType type, std::uint64_t count) { return GgufBuilder::array(type, count); };
  const std::vector<float> four{1, 2, 3, 4};
  std::string nested;
  for (int i = 0; i < 5; ++i) nested += array(GgufType::kArray, 1);
  nested += array(GgufType::kUint8, 0);
  std::string bomb;
  for (int i = 0; i < 100'000; ++i) bomb += array(GgufType::kArray, 1);

  GgufBuilder many_tensors;
  many_tensors.claimed_tensors = ~0ULL;
  GgufBuilder many_entries;
  many_entries.claimed_metadata = 1ULL << 62;
  GgufBuilder one_more_entry = full_file();
  one_more_entry.claimed_metadata = 1000;
  GgufBuilder old;
  old.version = 1;
  GgufBuilder big_endian;
  big_endian.version = 0x03000000;
  GgufBuilder zero;
  zero.version = 0;

  const std::vector<Case> cases{
      {"", corrupt, "the magic 'GGUF' needs 4 bytes at byte 0, but the file ends at byte 0"},
      {"GGML" + raw<std::uint32_t>(3), corrupt, "not a GGUF file"},
      {old.build(), unsupported, "GGUF version is 1, only 2 and 3 are read"},
      {zero.build(), unsupported, "GGUF version is 0"},
      {big_endian.build(), unsupported, "big-endian GGUF is not read (version field 50331648)"},
      {many_tensors.build(), corrupt,
       "the tensor count is 18446744073709551615, but the 0 bytes after byte 24 have room for at most 0"},
      {many_entries.build(), corrupt, "the metadata count is 4611686018427387904"},
      {one_more_entry.build(), corrupt, "metadata"},

      {GgufBuilder().entry("key", 13U, "1234").build(), corrupt,
       "metadata 'key': the value's type is 13, must be in 0..12"},
      {GgufBuilder().entry("key", GgufType::kString, raw<std::uint64_t>(~0ULL)).build(), corrupt,
       "metadata 'key': the string needs 18446744073709551615 bytes"},
      {GgufBuilder().entry("key", GgufType::kBool, "\x02").build(), corrupt,
       "metadata 'key': a bool is 2, must be 0 or 1"},
      {GgufBuilder().entry("key", GgufType::kArray, array(GgufType::kBool, 2) + "\x01\xff").build(), corrupt,
       "metadata 'key': a bool is 255"},
      {GgufBuilder().entry("key", GgufType::kArray, array(GgufType::kUint32, ~0ULL)).build(), corrupt,
       "metadata 'key': the array's length is 18446744073709551615"},
      {GgufBuilder().entry("key", GgufType::kArray, array(GgufType::kFloat64, 1ULL << 61)).build(), corrupt,
       "the array's length is 2305843009213693952"},
      {GgufBuilder().entry("key", GgufType::kArray, array(GgufType::kString, 1ULL << 60)).build(), corrupt,
       "the array's length is 1152921504606846976"},
      {GgufBuilder()
           .entry("key", GgufType::kArray, array(GgufType::kString, 1) + raw<std::uint64_t>(9))
           .build(),
       corrupt, "metadata 'key': a string of the array needs 9 bytes"},
      {GgufBuilder().entry("key", GgufType::kArray, array(static_cast<GgufType>(99), 1)).build(), corrupt,
       "metadata 'key': the array's element type is 99, must be in 0..12"},
      {GgufBuilder().entry("key", GgufType::kArray, nested).build(), corrupt,
       "metadata 'key': arrays are nested more than 4 deep"},
      {GgufBuilder().entry("key", GgufType::kArray, bomb).build(), corrupt,
       "arrays are nested more than 4 deep"},
      {GgufBuilder().entry("key", GgufType::kArray, array(GgufType::kArray, 1ULL << 40)).build(), corrupt,
       "the array's length is 1099511627776"},
      {GgufBuilder().u32("key", 1).u32("other", 1).u32("key", 2).build(), corrupt,
       "metadata 'key' is there twice"},
      {GgufBuilder().u32("general.alignment", 0).build(), corrupt,
       "metadata 'general.alignment' is the uint32 0"},
      {GgufBuilder().u32("general.alignment", 48).build(), corrupt,
       "is the uint32 48, must be a power of two"},
      {GgufBuilder().string("general.alignment", "32").build(), corrupt,
       "'general.alignment' is the string '32'"},
      {GgufBuilder().entry("general.alignment", GgufType::kUint64, raw<std::uint64_t>(1ULL << 40)).build(),
       corrupt, "'general.alignment' is the uint64 1099511627776"},

      {GgufBuilder().tensor_info("t", {1, 1, 1, 1, 1}, 0, 0).build(), corrupt,
       "tensor 't': has 5 dimensions"},
      {GgufBuilder().tensor_info("t", {4, 0}, 0, 0).build(), corrupt,
       "tensor 't': dimension 1 is 0, must be at least 1"},
      {GgufBuilder().tensor_info("t", {~0ULL}, 0, 0).build(), corrupt,
       "tensor 't': dimension 0 is 18446744073709551615, which gives more than 2^62 elements"},
      {GgufBuilder().tensor_info("t", {1ULL << 32, 1ULL << 32}, 0, 0).build(), corrupt,
       "dimension 1 is 4294967296, which gives more than 2^62 elements"},
      {GgufBuilder().tensor_info("t", {4}, 42, 0).build(), unsupported,
       "tensor 't': has the unknown type number 42, known are 0..41"},
      {GgufBuilder().tensor_info("t", {32}, 4, 0).build(), unsupported,
       "has type 4 (Q4_2), which ggml has removed"},
      {GgufBuilder().tensor_info("t", {48}, 8, 0).build(), corrupt,
       "tensor 't': has rows of 48 elements, not a multiple of 32 as its type Q8_0 needs"},
      {GgufBuilder().tensor_info("t", {1}, 0, 8).data("12345678").build(), corrupt,
       "tensor 't': has offset 8, not a multiple of the alignment 32"},
      {GgufBuilder().tensor_info("t", {5}, 0, 0).data(raw_all<float>(four)).build(), corrupt,
       "tensor 't': 5 blocks of 4 bytes at offset 0 of the tensor data do not fit"},
      {GgufBuilder().tensor_info("t", {1}, 0, ~0ULL - 31).data(raw_all<float>(four)).build(), corrupt,
       "at offset 18446744073709551584 of the tensor data do not fit"},
      {GgufBuilder().tensor_info("t", {1ULL << 62}, 28, 0).data(raw_all<float>(four)).build(), corrupt,
       "4611686018427387904 blocks of 8 bytes"},
      {GgufBuilder().tensor_info("t", {1}, 0, 0).build(), corrupt, "do not fit"},
      {GgufBuilder().tensor("t", {4}, four).tensor("t", {4}, four).build(), corrupt,
       "tensor 't' is there twice"},
      {GgufBuilder()
           .tensor_info("a", {9}, 0, 0)
           .tensor_info("b", {1}, 0, 32)
           .data(std::string(64, 'x'))
           .build(),
       corrupt, "tensors 'a' (bytes "},
      {GgufBuilder()
           .tensor_info("a", {4}, 0, 0)
           .tensor_info("b", {4}, 0, 0)
           .data(std::string(64, 'x'))
           .build(),
       corrupt, "overlap"},
  };
  for (const Case& bad : cases) {
    CAPTURE(bad.message);
    const std::vector<std::byte> bytes = exact_bytes(bad.bytes);
    const Result<GgufFile> file = parse(bytes);
    REQUIRE_FALSE(file.ok());
    CAPTURE(file.status().message());
    CHECK(file.status().code() == bad.code);
    CHECK(contains(file.status().message(), "test.gguf: "));
    CHECK(contains(file.status().message(), bad.message));
    CHECK(file.status().message().size() < 400);
  }
}

TEST_CASE("a tensor of a known type without conversion can be listed but not read", "[gguf]") {
  GgufBuilder builder;
  builder.tensor("t", {256}, 16, std::string(66, '\x11'));
  const std::vector<std::byte> bytes = exact_bytes(builder.build());
  const Result<GgufFile> file = parse(bytes);
  REQUIRE(file.ok());
  std::vector<float> out(256);
  const Status status = file->read_rows(file->tensors()[0], 0, 1, out.data());
  CHECK(status.code() == StatusCode::kUnsupported);
  CHECK(contains(status.message(), "tensor 't' has type 16 (IQ2_XXS), converted to fp32 are F32, F16, Q4_0"));
}

TEST_CASE("a GGUF file is mapped and stays mapped when its owner moves", "[gguf]") {
  const TemporaryFolder folder;
  put_file(folder / "m.gguf", full_file().build());
  Result<GgufFile> opened = GgufFile::open(folder / "m.gguf");
  REQUIRE(opened.ok());
  GgufFile file = *std::move(opened);
  CHECK(file.name() == folder / "m.gguf");
  CHECK(*file.string("general.architecture") == "llama");
  CHECK(usable(file));

  CHECK(GgufFile::open(folder / "missing.gguf").status().code() == StatusCode::kNotFound);
  CHECK(GgufFile::open(folder.path()).status().code() == StatusCode::kIoError);
  put_file(folder / "empty.gguf", "");
  CHECK(GgufFile::open(folder / "empty.gguf").status().code() == StatusCode::kCorruptData);
}
