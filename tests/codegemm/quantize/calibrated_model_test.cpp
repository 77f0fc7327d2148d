// SPDX-License-Identifier: Apache-2.0
//
// tests/codegemm/quantize/calibrated_model_test.cpp - layers of a real model, calibrated on one half of a
// text and judged on the other.

#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <codegemm/base/thread_pool.hpp>
#include <codegemm/quantize/calibrated.hpp>
#include <common/model_loader.hpp>
#include <common/model_tokenizer.hpp>
#include <common/text_tokens.hpp>
#include <prefillshare/model/calibrate.hpp>
#include <support/catch.hpp>

using namespace codegemm;
using prefillshare::CalibrationRun;
using prefillshare::DenseLinear;

namespace {

/// Replaces nothing; keeps H of each layer of the first block.
struct Grams {
  std::map<std::string, std::vector<float>> of;

  Result<std::optional<DenseLinear>> find(const std::string& /*name*/, const DenseLinear& /*dense*/) {
    return std::optional<DenseLinear>();
  }
  Result<DenseLinear> make(const std::string& name, const DenseLinear& dense, MatrixView<const float> gram) {
    of[name].assign(gram.data, gram.data + gram.rows * gram.cols);
    return dense;
  }
};

/// tr(E H E^T) / tr(W H W^T).
double output_error(const QuantizedMatrix& q, MatrixView<const float> w, const std::vector<float>& gram,
                    Executor& executor) {
  detail::AdditiveState s;
  s.format = q.format();
  s.rows = w.rows;
  s.cols = w.cols;
  s.weights = w;
  s.gram = detail::damped_gram({gram.data(), w.cols, w.cols}, 0.0, executor);
  detail::take_matrix(q, s);
  return detail::weighted_error(s, true, executor) / detail::weighted_error(s, false, executor);
}

}  // namespace

TEST_CASE("on a real model's layers calibration beats k-means by far, on held-out text too", "[calibrated]") {
  const char* path = std::getenv("PREFILLSHARE_TEST_MODEL");
  if (path == nullptr) TEST_SKIP("PREFILLSHARE_TEST_MODEL names no GGUF file");
  using namespace prefillshare::examples;
  const auto source = open_model(path).value();
  const LoadedModel loaded = load_model(*source).value();
  const Tokenizer tokenizer = load_tokenizer(path).value();
  const std::string here = __FILE__;
  const std::string root = here.substr(0, here.rfind("tests/codegemm"));
  const std::vector<std::int32_t> ids = tokens_of_file(root + "examples/data/river_report.txt", tokenizer);
  const auto half = ids.begin() + static_cast<std::ptrdiff_t>(ids.size() / 2);
  ThreadPool pool(2);
  const auto grams_of = [&](const std::vector<std::int32_t>& tokens) {
    Grams grams;
    CalibrationRun run = CalibrationRun::create(loaded.model, {tokens}, pool.workers()).value();
    REQUIRE(run.next_block(grams, pool).ok());
    return grams.of;
  };
  const auto seen = grams_of({ids.begin(), half});
  const auto held_out = grams_of({half, ids.end()});

  const auto& layer = loaded.model->layers.front();
  struct Case {
    const char* name;
    const DenseLinear* linear;
    double least;  // k-means' error over ours, on the held-out half
  };
  for (const char* format : {"m1v4g64", "m2v8g-1", "m1v8g64", "m1v2b6g64"}) {
    for (const Case& c : {Case{"model.layers.0.self_attn.k_proj", &layer.k, 4.0},
                          Case{"model.layers.0.self_attn.o_proj", &layer.o, 8.0}}) {
      CAPTURE(format, c.name);
      CalibratedOptions options;
      options.rounds = 3;
      options.beam = 2;
      const Format f = parse_format(format).value();
      const MatrixView<const float> w = c.linear->weights();
      const std::vector<float>& gram = seen.at(c.name);
      const auto ours = quantize_calibrated(w, {gram.data(), w.cols, w.cols}, f, options, pool);
      REQUIRE(ours.ok());
      const auto plain = quantize_kmeans(w, f, options.kmeans, pool);
      REQUIRE(plain.ok());
      const double before = output_error(*plain, w, gram, pool);
      const double after = output_error(*ours, w, gram, pool);
      const double plain_new = output_error(*plain, w, held_out.at(c.name), pool);
      const double ours_new = output_error(*ours, w, held_out.at(c.name), pool);
      CAPTURE(before, after, plain_new, ours_new);
      CHECK(after < 0.4 * before);
      CHECK(c.least * ours_new < plain_new);
    }
  }
}
