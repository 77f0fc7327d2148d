// SPDX-License-Identifier: Apache-2.0

#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/io/checkpoint.hpp>
#include <codegemm/io/temporary_folder.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>

using codegemm::Checkpoint;
using codegemm::Dtype;
using codegemm::Format;
using codegemm::Half;
using codegemm::NamedMatrix;
using codegemm::QuantizedMatrix;
using codegemm::Result;
using codegemm::SafetensorsFile;
using codegemm::SafetensorsTensor;
using codegemm::SafetensorsText;
using codegemm::Status;
using codegemm::StatusCode;
using namespace codegemm::test;

namespace {

QuantizedMatrix random_matrix(Format format, std::int64_t rows, std::int64_t cols, Rng& rng) {
  Result<QuantizedMatrix> made = QuantizedMatrix::create(format, rows, cols);
  REQUIRE(made.ok());
  QuantizedMatrix matrix = *std::move(made);
  for (int c = 0; c < format.m; ++c) {
    for (std::int64_t n = 0; n < rows; ++n) {
      for (std::int64_t j = 0; j < cols / format.v; ++j) {
        matrix.set_code(c, n, j, static_cast<std::uint32_t>(rng.below(format.centroids())));
      }
    }
  }
  for (Half& h : matrix.codebooks()) h = Half::from_float(rng.normal());
  for (Half& h : matrix.scales()) h = Half::from_float(rng.uniform(0.5F, 2.0F));
  return matrix;
}

bool same(const QuantizedMatrix& a, const QuantizedMatrix& b) {
  const auto equal = [](auto x, auto y) { return std::equal(x.begin(), x.end(), y.begin(), y.end()); };
  return a.format() == b.format() && a.rows() == b.rows() && a.cols() == b.cols() &&
         equal(a.codes(), b.codes()) && equal(a.codebooks(), b.codebooks()) && equal(a.scales(), b.scales());
}

/// The tensors and the description of a checkpoint with one matrix "w", to be damaged.
struct Parts {
  std::vector<std::byte> data = std::vector<std::byte>(1 << 16);
  std::vector<SafetensorsTensor> tensors;
  std::string description = R"({"version":1,"matrices":{"w":{"format":"m2v4b4g8","rows":3,"cols":40}}})";

  Parts() {
    add("w.codes", Dtype::kI32, {2, 3, 3});  // 10 vectors, 4 codes a word
    add("w.codebooks", Dtype::kF16, {2, 16, 4});
    add("w.scales", Dtype::kF16, {5, 3});
  }
  void add(const char* name, Dtype dtype, std::vector<std::int64_t> shape) {
    std::uint64_t bytes = 0;
    REQUIRE(codegemm::shape_bytes(shape, dtype, bytes));
    tensors.push_back(
        {name, dtype, std::move(shape), std::span(data).first(static_cast<std::size_t>(bytes))});
  }
  void replace(std::size_t index, Dtype dtype, std::vector<std::int64_t> shape) {
    const std::string name = tensors[index].name;
    add(name.c_str(), dtype, std::move(shape));
    tensors[index] = tensors.back();
    tensors.pop_back();
  }
  Result<Checkpoint> open(const TemporaryFolder& folder) const {
    const std::vector<SafetensorsText> metadata{{"codegemm", description}};
    REQUIRE(codegemm::write_safetensors(folder / "c", tensors, metadata).ok());
    return Checkpoint::open(folder / "c");
  }
};

}  // namespace

TEST_CASE("matrices of all kinds come back bit for bit", "[checkpoint]") {
  const std::uint64_t seed = seed_or(7);
  CAPTURE(seed);
  Rng rng(seed);
  struct Case {
    const char* name;
    Format format;
    std::int64_t rows, cols;
  };
  const Case cases[] = {
      {"model.layers.0.q", {4, 1, 8, 128}, 7, 260},
      {"model.layers.0.k", {8, 2, 8, -1}, 5, 64},
      {"b6", {4, 1, 6, 32}, 3, 36},
      {"b12", {8, 1, 12, -1}, 2, 24},
      {"b16", {16, 1, 16, 16}, 1, 48},
      {"m4", {2, 4, 4, 2}, 3, 10},
      {"no rows", {4, 1, 8, -1}, 0, 8},
      {"no cols", {4, 1, 8, -1}, 3, 0},
      {"quote \" and \\ and \xc3\xa9", {4, 1, 8, 4}, 2, 4},
  };
  std::vector<QuantizedMatrix> matrices;
  std::vector<NamedMatrix> named;
  matrices.reserve(std::size(cases));
  for (const Case& c : cases) {
    matrices.push_back(random_matrix(c.format, c.rows, c.cols, rng));
    named.push_back({c.name, matrices.back().view()});
  }
  const TemporaryFolder folder;
  const std::vector<SafetensorsText> metadata{{"base", "0123456789abcdef"}};
  const Status saved = codegemm::save_checkpoint(folder / "c", named, metadata);
  CAPTURE(saved.message());
  REQUIRE(saved.ok());

  const Result<Checkpoint> checkpoint = Checkpoint::open(folder / "c");
  CAPTURE(checkpoint.status().message());
  REQUIRE(checkpoint.ok());
  CHECK(checkpoint->entries().size() == std::size(cases));
  REQUIRE(checkpoint->file().find_metadata("base") != nullptr);
  CHECK(*checkpoint->file().find_metadata("base") == "0123456789abcdef");
  for (std::size_t i = 0; i < std::size(cases); ++i) {
    CAPTURE(cases[i].name);
    const codegemm::CheckpointEntry* entry = checkpoint->find(cases[i].name);
    REQUIRE(entry != nullptr);
    CHECK(entry->format == cases[i].format);
    const Result<QuantizedMatrix> loaded = checkpoint->load(cases[i].name);
    CAPTURE(loaded.status().message());
    REQUIRE(loaded.ok());
    CHECK(same(*loaded, matrices[i]));
  }
  CHECK(checkpoint->find("absent") == nullptr);
  CHECK(checkpoint->load("absent").status().code() == StatusCode::kNotFound);
}

TEST_CASE("the tensors have the canonical names, types and shapes", "[checkpoint]") {
  Rng rng(3);
  const QuantizedMatrix matrix = random_matrix({4, 2, 8, 128}, 7, 520, rng);
  const TemporaryFolder folder;
  const std::vector<NamedMatrix> named{{"w", matrix.view()}};
  REQUIRE(codegemm::save_checkpoint(folder / "c", named).ok());
  const Result<SafetensorsFile> file = SafetensorsFile::open(folder / "c");
  REQUIRE(file.ok());
  REQUIRE(file->tensors().size() == 3);
  CHECK(file->find("w.codes")->dtype == Dtype::kI32);
  CHECK(file->find("w.codes")->shape == std::vector<std::int64_t>{2, 33, 7});
  CHECK(file->find("w.codebooks")->dtype == Dtype::kF16);
  CHECK(file->find("w.codebooks")->shape == std::vector<std::int64_t>{2, 256, 4});
  CHECK(file->find("w.scales")->dtype == Dtype::kF16);
  CHECK(file->find("w.scales")->shape == std::vector<std::int64_t>{5, 7});
  CHECK(*file->find_metadata("codegemm") ==
        R"({"version":1,"matrices":{"w":{"format":"m2v4g128","rows":7,"cols":520}}})");
}

TEST_CASE("an undamaged checkpoint built by hand opens", "[checkpoint]") {
  const TemporaryFolder folder;
  Parts parts;
  parts.add("embedding", Dtype::kF32, {2, 2});  // belongs to no matrix
  const Result<Checkpoint> checkpoint = parts.open(folder);
  CAPTURE(checkpoint.status().message());
  REQUIRE(checkpoint.ok());
  CHECK(checkpoint->load("w").ok());
  CHECK(checkpoint->file().find("embedding") != nullptr);
}

TEST_CASE("tensors that do not fit the description are refused by name and shape", "[checkpoint]") {
  struct Case {
    std::size_t tensor;
    Dtype dtype;
    std::vector<std::int64_t> shape;
    const char* message;
  };
  const std::vector<Case> cases{
      {0,
       Dtype::kI32,
       {2, 2, 3},
       "tensor 'w.codes' is I32 [2, 2, 3], must be I32 [2, 3, 3] for m2v4b4g8 of 3 x 40"},
      {0, Dtype::kI32, {18}, "tensor 'w.codes' is I32 [18]"},
      {0, Dtype::kU32, {2, 3, 3}, "tensor 'w.codes' is U32 [2, 3, 3], must be I32"},
      {1, Dtype::kF16, {2, 256, 4}, "tensor 'w.codebooks' is F16 [2, 256, 4], must be F16 [2, 16, 4]"},
      {1, Dtype::kBF16, {2, 16, 4}, "tensor 'w.codebooks' is BF16"},
      {2, Dtype::kF16, {1, 3}, "tensor 'w.scales' is F16 [1, 3], must be F16 [5, 3]"},
  };
  for (const Case& bad : cases) {
    const TemporaryFolder folder;
    Parts parts;
    parts.replace(bad.tensor, bad.dtype, bad.shape);
    const Status status = parts.open(folder).status();
    CAPTURE(status.message());
    CHECK(status.code() == StatusCode::kCorruptData);
    CHECK(contains(status.message(), (folder / "c") + ": matrix 'w': "));
    CHECK(contains(status.message(), bad.message));
  }
  const TemporaryFolder folder;
  Parts parts;
  parts.tensors.pop_back();
  CHECK(contains(parts.open(folder).status().message(), "matrix 'w': tensor 'w.scales' is missing"));
}

TEST_CASE("descriptions that make no sense are refused", "[checkpoint]") {
  struct Case {
    const char* description;
    StatusCode code;
    const char* message;
  };
  const StatusCode corrupt = StatusCode::kCorruptData;
  const Case cases[] = {
      {"", corrupt, "metadata 'codegemm' is no JSON object"},
      {"[1]", corrupt, "metadata 'codegemm' is no JSON object"},
      {"{}", corrupt, "has no 'version'"},
      {R"({"version":"1"})", corrupt, "has no 'version'"},
      {R"({"version":2,"matrices":{}})", StatusCode::kUnsupported, "checkpoint version is 2, only 1 is read"},
      {R"({"version":1})", corrupt, "has no 'matrices'"},
      {R"({"version":1,"matrices":[]})", corrupt, "has no 'matrices'"},
      {R"({"version":1,"matrices":{"w":1}})", corrupt, "matrix 'w': is of type number, must be an object"},
      {R"({"version":1,"matrices":{"w":{"rows":1,"cols":4}}})", corrupt, "matrix 'w': has no text 'format'"},
      {R"({"version":1,"matrices":{"w":{"format":4,"rows":1,"cols":4}}})", corrupt, "has no text 'format'"},
      {R"({"version":1,"matrices":{"w":{"format":"m9v4","rows":1,"cols":4}}})", StatusCode::kInvalidArgument,
       "m9v4"},
      {R"({"version":1,"matrices":{"w":{"format":"m2v4b4g8","cols":40}}})", corrupt, "has no number 'rows'"},
      {R"({"version":1,"matrices":{"w":{"format":"m2v4b4g8","rows":-3,"cols":40}}})", corrupt,
       "has no number 'rows'"},
      {R"({"version":1,"matrices":{"w":{"format":"m2v4b4g8","rows":3,"cols":1.5}}})", corrupt,
       "has no number 'cols'"},
      {R"({"version":1,"matrices":{"w":{"format":"m2v4b4g8","rows":18446744073709551615,"cols":40}}})",
       corrupt, "'rows' is 18446744073709551615, must be below 2^63"},
      {R"({"version":1,"matrices":{"w":{"format":"m2v4b4g8","rows":4611686018427387904,"cols":40}}})",
       corrupt, "is too large"},
      {R"({"version":1,"matrices":{"w":{"format":"m2v4b4g8","rows":3,"cols":41}}})", corrupt,
       "K = 41 is not a multiple of v = 4"},
      {R"({"version":1,"matrices":{"x":{"format":"m2v4b4g8","rows":3,"cols":40}}})", corrupt,
       "tensor 'x.codes' is missing"},
  };
  for (const Case& bad : cases) {
    const TemporaryFolder folder;
    CAPTURE(bad.description);
    Parts parts;
    parts.description = bad.description;
    const Status status = parts.open(folder).status();
    CAPTURE(status.message());
    CHECK(status.code() == bad.code);
    CHECK(contains(status.message(), folder / "c"));
    CHECK(contains(status.message(), bad.message));
  }
  const TemporaryFolder folder;
  REQUIRE(codegemm::write_safetensors(folder / "c", {}).ok());
  CHECK(contains(Checkpoint::open(folder / "c").status().message(), "is no CodeGEMM checkpoint"));
}

TEST_CASE("a code beyond its codebook is found before it is used", "[checkpoint]") {
  const TemporaryFolder folder;
  Parts parts;
  const std::uint32_t word = 0x00100000;  // 16 as the third code of the first word; b = 4
  std::memcpy(parts.data.data(), &word, sizeof(word));
  const Result<Checkpoint> checkpoint = parts.open(folder);
  REQUIRE(checkpoint.ok());
  const Status status = checkpoint->load("w").status();
  CAPTURE(status.message());
  CHECK(status.code() == StatusCode::kCorruptData);
  CHECK(contains(status.message(), (folder / "c") + ": 'w': "));
  CHECK(contains(status.message(), "code 16"));
}

TEST_CASE("a matrix that is not valid is not saved", "[checkpoint]") {
  const TemporaryFolder folder;
  Rng rng(5);
  const QuantizedMatrix matrix = random_matrix({4, 1, 8, -1}, 2, 8, rng);
  codegemm::QuantizedMatrixView view = matrix.view();
  view.scales = nullptr;
  const std::vector<NamedMatrix> named{{"w", view}};
  const Status status = codegemm::save_checkpoint(folder / "c", named);
  CHECK(status.code() == StatusCode::kNullPointer);
  CHECK(contains(status.message(), "'w'"));

  const std::vector<NamedMatrix> twice{{"w", matrix.view()}, {"w", matrix.view()}};
  CHECK(codegemm::save_checkpoint(folder / "c", twice).code() == StatusCode::kInvalidArgument);
  const std::vector<NamedMatrix> one{{"w", matrix.view()}};
  const std::vector<SafetensorsText> reserved{{"codegemm", "x"}};
  CHECK(codegemm::save_checkpoint(folder / "c", one, reserved).code() == StatusCode::kInvalidArgument);
  CHECK(folder.list().empty());
}

TEST_CASE("a checkpoint cut at any byte is refused", "[checkpoint]") {
  const TemporaryFolder folder;
  Rng rng(9);
  const QuantizedMatrix matrix = random_matrix({4, 1, 4, 8}, 3, 16, rng);
  const std::vector<NamedMatrix> named{{"w", matrix.view()}};
  REQUIRE(codegemm::save_checkpoint(folder / "c", named).ok());
  const std::string whole = get_file(folder / "c");
  for (std::size_t size = 0; size < whole.size(); ++size) {
    CAPTURE(size);
    const std::vector<std::byte> bytes = exact_bytes(std::string_view(whole).substr(0, size));
    REQUIRE_FALSE(SafetensorsFile::parse(bytes, "cut").ok());
  }
}
