// SPDX-License-Identifier: Apache-2.0

#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <codegemm/io/safetensors.hpp>
#include <codegemm/io/safetensors_writer.hpp>
#include <codegemm/io/temporary_folder.hpp>
#include <support/catch.hpp>

using codegemm::Dtype;
using codegemm::Result;
using codegemm::SafetensorsFile;
using codegemm::SafetensorsTensor;
using codegemm::SafetensorsText;
using codegemm::Status;
using codegemm::StatusCode;
using namespace codegemm::test;

namespace {

std::string with_length(std::string_view header, std::string_view data = {}) {
  const std::uint64_t length = header.size();
  std::string out(sizeof(length), '\0');
  std::memcpy(out.data(), &length, sizeof(length));
  return out.append(header).append(data);
}

// Written by the Python package safetensors 0.8.0: a scalar, an empty tensor, a name to escape, metadata.
const std::string kReferenceHeader = R"({"__metadata__":{"note":"a \"quoted\"\nline","format":"pt"},)"
                                     R"("e":{"dtype":"F64","shape":[0,3],"data_offsets":[0,0]},)"
                                     R"("s":{"dtype":"F32","shape":[],"data_offsets":[0,4]},)"
                                     R"("a.weight":{"dtype":"BF16","shape":[1,3],"data_offsets":[4,10]},)"
                                     R"("b":{"dtype":"I8","shape":[2,2],"data_offsets":[10,14]},)"
                                     "\"\xc3\xa9\\\"\\\\\""
                                     R"(:{"dtype":"BOOL","shape":[2],"data_offsets":[14,16]}}    )";
const std::string kReferenceData("\0\0\xe0\x40\0\x3f\xc0\xbf\0\x40\x01\xfe\x03\x04\x01\0", 16);

template <class T>
std::vector<T> values(const SafetensorsTensor& tensor) {
  std::vector<T> out(tensor.data.size() / sizeof(T));
  if (!out.empty()) std::memcpy(out.data(), tensor.data.data(), tensor.data.size());
  return out;
}

int byte_sum(std::span<const std::byte> bytes) {
  int sum = 0;
  for (const std::byte byte : bytes) sum += std::to_integer<int>(byte);
  return sum;
}

struct BadCase {
  const char* header;
  std::size_t data_bytes;
  StatusCode code;
  const char* message;  // a part of it
};

}  // namespace

TEST_CASE("a file of the reference implementation reads as it was written", "[safetensors]") {
  const std::vector<std::byte> bytes = exact_bytes(with_length(kReferenceHeader, kReferenceData));
  const Result<SafetensorsFile> file = SafetensorsFile::parse(bytes, "ref");
  REQUIRE(file.ok());
  REQUIRE(file->tensors().size() == 5);
  CHECK(file->metadata().size() == 2);
  REQUIRE(file->find_metadata("note") != nullptr);
  CHECK(*file->find_metadata("note") == "a \"quoted\"\nline");
  CHECK(*file->find_metadata("format") == "pt");
  CHECK(file->find_metadata("absent") == nullptr);

  REQUIRE(file->find("s") != nullptr);
  CHECK(file->find("s")->shape.empty());
  CHECK(file->find("s")->elements() == 1);
  CHECK(values<float>(*file->find("s")) == std::vector<float>{7.0F});
  REQUIRE(file->find("e") != nullptr);
  CHECK(file->find("e")->shape == std::vector<std::int64_t>{0, 3});
  CHECK(file->find("e")->elements() == 0);
  REQUIRE(file->find("a.weight") != nullptr);
  CHECK(file->find("a.weight")->dtype == Dtype::kBF16);
  CHECK(values<std::uint16_t>(*file->find("a.weight")) == std::vector<std::uint16_t>{0x3F00, 0xBFC0, 0x4000});
  REQUIRE(file->find("b") != nullptr);
  CHECK(values<std::int8_t>(*file->find("b")) == std::vector<std::int8_t>{1, -2, 3, 4});
  REQUIRE(file->find("\xc3\xa9\"\\") != nullptr);
  CHECK(file->find("\xc3\xa9\"\\")->dtype == Dtype::kBool);
  CHECK(file->find("absent") == nullptr);
  // Zero copy: the data lie in the bytes given.
  CHECK(file->find("s")->data.data() == bytes.data() + 8 + kReferenceHeader.size());
}

TEST_CASE("a file cut at any byte is refused", "[safetensors]") {
  const std::string whole = with_length(kReferenceHeader, kReferenceData);
  for (std::size_t size = 0; size < whole.size(); ++size) {
    CAPTURE(size);
    const std::vector<std::byte> bytes = exact_bytes(std::string_view(whole).substr(0, size));
    const Result<SafetensorsFile> file = SafetensorsFile::parse(bytes, "cut");
    REQUIRE_FALSE(file.ok());
    CHECK(file.status().code() == StatusCode::kCorruptData);
    CHECK(contains(file.status().message(), "cut: "));
  }
  CHECK_FALSE(SafetensorsFile::parse(exact_bytes(whole + "x"), "long").ok());
}

TEST_CASE("no change of a single byte gets past the checks into bad memory", "[safetensors]") {
  const std::string whole = with_length(kReferenceHeader, kReferenceData);
  const int data_sum = byte_sum(exact_bytes(kReferenceData));
  int refused = 0;
  for (std::size_t at = 0; at < whole.size() - kReferenceData.size(); ++at) {
    for (const int change : {0x01, 0x02, 0x04, 0x08, 0x10, 0x20, 0x40, 0x80, 0xFF}) {
      std::string text = whole;
      text[at] = static_cast<char>(text[at] ^ change);
      const std::vector<std::byte> bytes = exact_bytes(text);
      const Result<SafetensorsFile> file = SafetensorsFile::parse(bytes, "changed");
      if (!file.ok()) {
        ++refused;
        continue;
      }
      int sum = 0;  // of every byte once
      for (const SafetensorsTensor& tensor : file->tensors()) sum += byte_sum(tensor.data);
      REQUIRE(sum == data_sum);
    }
  }
  CHECK(refused > 1000);  // most of them: what remains is inside names
}

TEST_CASE("headers that contradict the format are refused with names and numbers", "[safetensors]") {
  const StatusCode corrupt = StatusCode::kCorruptData;
  const BadCase cases[] = {
      {"", 0, corrupt, "the header of 0 bytes does not start with '{'"},
      {" {}", 0, corrupt, "does not start with '{'"},
      {"[]", 0, corrupt, "does not start with '{'"},
      {"{", 0, corrupt, "the header is no JSON at its byte"},
      {"{} x", 0, corrupt, "the header is no JSON at its byte"},
      {"{\"a\":\"\xff\"}", 0, corrupt, "the header is no JSON at its byte"},
      {"{}", 5, corrupt, "the tensors cover 0 of the 5 bytes of data"},
      {R"({"a":1})", 0, corrupt, "'a' is a number, must be an object"},
      {R"({"a":[]})", 0, corrupt, "'a' is an array, must be an object"},
      {R"({"a":null})", 0, corrupt, "'a' is null, must be an object"},
      {R"({"a":{}})", 0, corrupt, "tensor 'a': has no 'dtype'"},
      {R"({"a":{"dtype":"U8","data_offsets":[0,0]}})", 0, corrupt, "tensor 'a': has no 'shape'"},
      {R"({"a":{"dtype":"U8","shape":[0]}})", 0, corrupt, "tensor 'a': has no 'data_offsets'"},
      {R"({"a":{"dtype":"U9","shape":[1],"data_offsets":[0,1]}})", 1, StatusCode::kUnsupported,
       "tensor 'a': 'dtype': is 'U9', known are F64, F32,"},
      {R"({"a":{"dtype":8,"shape":[1],"data_offsets":[0,1]}})", 1, corrupt,
       "tensor 'a': 'dtype': is a number, must be a string"},
      {R"({"a":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}})", 1, corrupt,
       "tensor 'a': 'dtype': is an array, must be a string"},
      {R"({"a":{"dtype":"U8","shape":"1","data_offsets":[0,1]}})", 1, corrupt,
       "tensor 'a': 'shape': is a string, must be an array of numbers"},
      {R"({"a":{"dtype":"U8","shape":{},"data_offsets":[0,1]}})", 1, corrupt,
       "tensor 'a': 'shape': is an object, must be an array of numbers"},
      {R"({"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", 1, corrupt,
       "tensor 'a': 'shape': is -1, must not be negative"},
      {R"({"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}})", 1, corrupt,
       "tensor 'a': 'shape': is '1.5', not an integer"},
      {R"({"a":{"dtype":"U8","shape":[18446744073709551616],"data_offsets":[0,1]}})", 1, corrupt,
       "is '18446744073709551616', not an integer of at most 64 bits"},
      {R"({"a":{"dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,1]}})", 1, corrupt,
       "dimension 9223372036854775808 is above 2^63 - 1"},
      {R"({"a":{"dtype":"U8","shape":[[1]],"data_offsets":[0,1]}})", 1, corrupt, "holds an array"},
      {R"({"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}})", 1, corrupt, "holds a boolean"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}})", 1, corrupt,
       "tensor 'a': 'data_offsets': has 1 numbers, must have two"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}})", 1, corrupt, "has more than two numbers"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}})", 1, corrupt,
       "tensor 'a': 'x': unknown field"},
      {R"({"a":{"dtype":"U8","shape":[1],"shape":[1],"data_offsets":[0,1]}})", 1, corrupt,
       "tensor 'a': 'shape': is there twice"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
       R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
       2, corrupt, "tensor 'a' is there twice"},
      {R"({"__metadata__":{"k":"v","k":"w"}})", 0, corrupt, "__metadata__ 'k' is there twice"},
      {R"({"__metadata__":{},"__metadata__":{}})", 0, corrupt, "'__metadata__' is there twice"},
      {R"({"__metadata__":{"k":1}})", 0, corrupt, "__metadata__: 'k': is a number, must be a string"},
      {R"({"__metadata__":{"k":{}}})", 0, corrupt, "__metadata__: 'k': is an object, must be a string"},
      {R"({"__metadata__":[]})", 0, corrupt, "'__metadata__' is an array, must be an object"},
      {R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4, corrupt,
       "tensor 'a': shape [2] of F32 does not make the 4 bytes of data_offsets 0..4"},
      {R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}})", 8, corrupt, "does not make the 8 bytes"},
      {R"({"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", 0, corrupt,
       "shape [4294967296, 4294967296] of U8 does not make the 0 bytes"},
      {R"({"a":{"dtype":"U8","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}})", 0, corrupt,
       "does not make"},
      {R"({"a":{"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]}})", 0, corrupt,
       "does not make"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}})", 1, corrupt,
       "data_offsets 1..0 are not within"},
      {R"({"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}})", 8, corrupt,
       "tensor 'a': data_offsets 0..9 are not within the 8 bytes of data"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551615,18446744073709551615]}})", 1,
       corrupt, "are not within the 1 bytes"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", 2, corrupt,
       "tensor 'a': data_offsets start at 1, must start at 0"},
      {R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
       R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
       3, corrupt, "tensor 'b': data_offsets start at 1, must start at 2"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
       R"("b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
       3, corrupt, "tensor 'b': data_offsets start at 2, must start at 1"},
      {R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", 3, corrupt,
       "cover 1 of the 3 bytes of data"},
  };
  for (const BadCase& bad : cases) {
    CAPTURE(bad.header);
    const std::vector<std::byte> bytes =
        exact_bytes(with_length(bad.header, std::string(bad.data_bytes, '\0')));
    const Result<SafetensorsFile> file = SafetensorsFile::parse(bytes, "bad.safetensors");
    REQUIRE_FALSE(file.ok());
    CAPTURE(file.status().message());
    CHECK(file.status().code() == bad.code);
    CHECK(contains(file.status().message(), "bad.safetensors: "));
    CHECK(contains(file.status().message(), bad.message));
  }
}

TEST_CASE("absurd header lengths, ranks and depths are refused before they cost anything", "[safetensors]") {
  std::string absurd(8, '\xff');
  CHECK(contains(SafetensorsFile::parse(exact_bytes(absurd), "f").status().message(),
                 "the header length is 18446744073709551615, at most 100000000 is allowed"));
  const std::string short_of("\x10\0\0\0\0\0\0\0{}", 10);
  CHECK(contains(SafetensorsFile::parse(exact_bytes(short_of), "f").status().message(),
                 "the header length is 16, but only 2 bytes follow it"));

  const std::string deep = R"({"a":{"dtype":"U8","shape":)" + std::string(1'000'000, '[');
  CHECK(contains(SafetensorsFile::parse(exact_bytes(with_length(deep)), "f").status().message(),
                 "holds an array"));
  std::string nested;
  for (int i = 0; i < 200'000; ++i) nested += "{\"a\":";
  CHECK(contains(SafetensorsFile::parse(exact_bytes(with_length(nested)), "f").status().message(),
                 "unknown field"));

  std::string ranks = R"({"a":{"dtype":"U8","shape":[1)";
  for (int i = 0; i < 32; ++i) ranks += ",1";
  ranks += R"(],"data_offsets":[0,1]}})";
  const Status rank = SafetensorsFile::parse(exact_bytes(with_length(ranks, "x")), "f").status();
  CHECK(rank.code() == StatusCode::kUnsupported);
  CHECK(contains(rank.message(), "has more than 32 dimensions"));

  const std::string long_name =
      R"({")" + std::string(100'000, 'n') + R"(":{"dtype":"U8","shape":[1],"data_offsets":[0,2]}})";
  CHECK(SafetensorsFile::parse(exact_bytes(with_length(long_name, "xx")), "f").status().message().size() <
        300);
}

TEST_CASE("what is written is read back, aligned and in order", "[safetensors]") {
  const TemporaryFolder folder;
  const std::vector<std::uint8_t> bytes{1, 2, 3};
  const std::vector<float> floats{1.5F, -2.0F};
  const std::vector<std::int64_t> wide{-7};
  const std::vector<std::uint16_t> halves{1, 2, 3};
  const std::vector<SafetensorsTensor> tensors{
      {"bytes", Dtype::kU8, {3}, std::as_bytes(std::span(bytes))},
      {"floats \"\\\n\xc3\xa9", Dtype::kF32, {1, 2, 1}, std::as_bytes(std::span(floats))},
      {"empty", Dtype::kF32, {0}, {}},
      {"wide", Dtype::kI64, {}, std::as_bytes(std::span(wide))},
      {"halves", Dtype::kF16, {3}, std::as_bytes(std::span(halves))},
  };
  const std::vector<SafetensorsText> metadata{{"z", "first"}, {"a\t", "{\"json\": [1, \"\x01\"]}"}};
  REQUIRE(codegemm::write_safetensors(folder / "f", tensors, metadata).ok());
  CHECK(folder.list() == std::vector<std::string>{"f"});

  const Result<SafetensorsFile> file = SafetensorsFile::open(folder / "f");
  REQUIRE(file.ok());
  REQUIRE(file->tensors().size() == tensors.size());
  for (const SafetensorsTensor& want : tensors) {
    CAPTURE(want.name);
    const SafetensorsTensor* got = file->find(want.name);
    REQUIRE(got != nullptr);
    CHECK(got->dtype == want.dtype);
    CHECK(got->shape == want.shape);
    CHECK(std::vector<std::byte>(got->data.begin(), got->data.end()) ==
          std::vector<std::byte>(want.data.begin(), want.data.end()));
    CHECK(reinterpret_cast<std::uintptr_t>(got->data.data()) % codegemm::item_size(got->dtype) == 0);
  }
  CHECK(*file->find_metadata("z") == "first");
  CHECK(*file->find_metadata("a\t") == metadata[1].value);

  const std::string raw = get_file(folder / "f");
  std::uint64_t header = 0;
  std::memcpy(&header, raw.data(), sizeof(header));
  CHECK(header % 8 == 0);
  CHECK(raw.find("\"wide\"") < raw.find("\"floats"));
  CHECK(raw.find("\"floats") < raw.find("\"empty\""));
  CHECK(raw.find("\"halves\"") < raw.find("\"bytes\""));
  CHECK(raw.find("\"z\"") < raw.find("\"a\\u0009\""));
}

TEST_CASE("a file without tensors is written and read", "[safetensors]") {
  const TemporaryFolder folder;
  REQUIRE(codegemm::write_safetensors(folder / "f", {}).ok());
  const Result<SafetensorsFile> file = SafetensorsFile::open(folder / "f");
  REQUIRE(file.ok());
  CHECK(file->tensors().empty());
  CHECK(file->metadata().empty());
}

TEST_CASE("what no reader would take is not written", "[safetensors]") {
  const TemporaryFolder folder;
  const std::vector<std::byte> four(4);
  const SafetensorsTensor good{"a", Dtype::kF32, {1}, four};
  const std::vector<std::vector<SafetensorsTensor>> bad{
      {good, good},
      {{"a", Dtype::kF32, {2}, four}},
      {{"a", Dtype::kF32, {-1}, four}},
      {{"a\xff", Dtype::kF32, {1}, four}},
      {{"__metadata__", Dtype::kF32, {1}, four}},
  };
  for (const std::vector<SafetensorsTensor>& tensors : bad) {
    const Status status = codegemm::write_safetensors(folder / "f", tensors);
    REQUIRE_FALSE(status.ok());
    CAPTURE(status.message());
    CHECK(status.code() == StatusCode::kInvalidArgument);
    CHECK(contains(status.message(), folder / "f"));
  }
  const std::vector<SafetensorsText> twice{{"k", "1"}, {"k", "2"}};
  CHECK(codegemm::write_safetensors(folder / "f", {}, twice).code() == StatusCode::kInvalidArgument);
  CHECK(folder.list().empty());
}

TEST_CASE("files that are not there or empty are named", "[safetensors]") {
  const TemporaryFolder folder;
  CHECK(SafetensorsFile::open(folder / "missing").status().code() == StatusCode::kNotFound);
  CHECK(SafetensorsFile::open(folder.path()).status().code() == StatusCode::kIoError);
  put_file(folder / "empty", "");
  CHECK(SafetensorsFile::open(folder / "empty").status().code() == StatusCode::kCorruptData);
}
