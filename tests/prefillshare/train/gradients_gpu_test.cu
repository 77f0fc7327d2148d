// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/train/gradients_gpu_test.cu - losses and gradients of every parameter on the GPU
// against the CPU's in double, and their bits.

// What nvcc's front end remarks on in Eigen and in the CPU's kernels.
#pragma nv_diag_suppress 20012, 1675, 550

#include <prefillshare/train/cuda/pass.cuh>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <codegemm/base/thread_pool.hpp>
#include <prefillshare/train/pass.hpp>
#include <support/catch.hpp>

#include "gpu_training.cuh"

namespace prefillshare::test {
namespace {

using cuda::Activations;
using cuda::DeviceTrainable;
using cuda::DeviceTrainPass;

template <class S>
constexpr bool kExact = std::is_same_v<S, float>;

/// ||got - want|| / ||want||; NaN counts as infinite.
template <class T>
double relative(const Tensor<T>& got, const Tensor<double>& want) {
  double off = 0.0;
  double size = 1e-30;
  for (std::int64_t i = 0; i < want.size(); ++i) {
    const double d = static_cast<double>(got[i]) - want[i];
    off += d * d;
    size += want[i] * want[i];
  }
  const double out = std::sqrt(off / size);
  return out == out ? out : HUGE_VAL;
}

template <class S>
struct DeviceRun {
  std::vector<float> losses;
  TrainableModel<float> model;
};

template <class S>
DeviceRun<S> run_on_device(const Variant& v, const Problem& problem, TrainableModel<float> model,
                           Activations activations, const Device& device, cudaStream_t stream) {
  auto pass = DeviceTrainPass<S>::create(v.config, std::ssize(problem.batch.tokens), 256, activations, device,
                                         stream);
  require_ok(pass.status());
  auto weights = DeviceTrainable<S>::create(model, device, stream);
  require_ok(weights.status());
  codegemm::cuda::DeviceArray<S> memory;
  const DeviceLossBatch<S> batch = problem.on_device<S>(v.config, memory);
  codegemm::test::DeviceBuffer<float> losses(batch.labels.size());
  losses.poison();
  for (Parameter<float>& p : model.parameters())
    std::fill(p.gradient.span().begin(), p.gradient.span().end(), std::numeric_limits<float>::quiet_NaN());
  weights->zero_gradients(pass->train_stream());
  require_ok(pass->run(*weights, batch, 0.5F, losses.data()));
  require_ok(pass->run(*weights, batch, 0.5F, losses.data()));  // gradients add up
  weights->collect(pass->train_stream());
  require_ok(weights->download_gradients(model, pass->train_stream()));
  CHECK(losses.guards_intact());
  return {losses.download(), std::move(model)};
}

/// Stores what the GPU stores in bf16 as bf16 holds it; probabilities where the GPU gives them to its tensor
/// cores.
struct StoreAsBf16 {
  bool tensor_cores = false;

  template <class T>
  void operator()(T* x, std::int64_t size) const {
    for (std::int64_t i = 0; i < size; ++i)
      x[i] = static_cast<T>(__bfloat162float(__float2bfloat16(static_cast<float>(x[i]))));
  }
  template <class T>
  void probabilities(T* x, std::int64_t size) const {
    if (tensor_cores) (*this)(x, size);
  }
};

/// How far off results may be: the most for a loss, and relative for each gradient.
struct Bounds {
  double losses = 0.0;
  std::vector<double> gradients;
};

/// fp32 by a constant. bf16 by what its 8 bits cost in this problem: the CPU's pass in double that rounds at
/// the points where the GPU does. Other sums round other values the other way, so twice that, and one
/// rounding more for what hardly any reaches.
template <class S>
Bounds bounds_of(const Variant& v, const Problem& problem, TrainableModel<double> model,
                 const TrainableModel<double>& exact, const std::vector<double>& want,
                 codegemm::Executor& executor) {
  Bounds out;
  out.losses = 1e-5 * *std::max_element(want.begin(), want.end());
  out.gradients.assign(exact.parameters().size(), 2e-5);
  if constexpr (!kExact<S>) {
    const StoreAsBf16 store{cuda::detail::attends_on_tensor_cores<S>(v.config.head_dim)};
    auto pass = TrainPass<double, StoreAsBf16>::create(v.config, std::ssize(problem.batch.tokens), 256,
                                                       executor, store)
                    .value();
    std::vector<double> losses;
    require_ok(pass.run(model, problem.batch, true, 1.0, losses));
    for (std::size_t i = 0; i < want.size(); ++i)
      out.losses = std::max(out.losses, 2.0 * std::abs(losses[i] - want[i]));
    for (std::size_t i = 0; i < out.gradients.size(); ++i) {
      const double off = relative(model.parameters()[i].gradient, exact.parameters()[i].gradient);
      out.gradients[i] = 2.0 * off + 0x1p-9;
    }
  }
  return out;
}

template <class S>
void check_against_double(const Device& device, cudaStream_t stream) {
  codegemm::ThreadPool pool(4);
  for (const Variant& v : variants()) {
    for (const Kind kind : {Kind::kFull, Kind::kLowRank, Kind::kCodebooks}) {
      const Problem problem(v, 71);
      const auto model = rounded_model<__nv_bfloat16>(v.config, 72);
      auto exact = trainable<double>(model, kind);
      auto pass = TrainPass<double>::create(v.config, std::ssize(problem.batch.tokens), 256, pool).value();
      std::vector<double> want;
      require_ok(pass.run(exact, problem.batch, true, 1.0, want));
      const DeviceRun<S> got =
          run_on_device<S>(v, problem, trainable<float>(model, kind), Activations::kKept, device, stream);
      const Bounds bounds = bounds_of<S>(v, problem, trainable<double>(model, kind), exact, want, pool);
      double loss_error = 0.0;
      for (std::size_t i = 0; i < want.size(); ++i) {
        const double off = std::abs(static_cast<double>(got.losses[i]) - want[i]);
        loss_error = off <= loss_error ? loss_error : (off == off ? off : HUGE_VAL);
      }
      double worst = 0.0;
      double share = 0.0;  // of the bound
      std::string worst_name;
      for (std::size_t i = 0; i < exact.parameters().size(); ++i) {
        const std::string& name = exact.parameters()[i].name;
        const double bound = bounds.gradients[i];
        const double off = relative(got.model.parameters()[i].gradient, exact.parameters()[i].gradient);
        share = std::max(share, off / bound);
        if (off >= worst) {
          worst = off;
          worst_name = name;
        }
        CAPTURE(v.name, static_cast<int>(kind), name);
        CHECK(off <= bound);
      }
      std::printf(
          "%s, %s, kind %d: losses off by %.2g of %.2g, gradients by at most %.2g (%s), %.2f of a bound\n",
          kExact<S> ? "fp32" : "bf16", v.name, static_cast<int>(kind), loss_error, bounds.losses, worst,
          worst_name.c_str(), share);
      std::fflush(stdout);
      CAPTURE(v.name, static_cast<int>(kind));
      CHECK(loss_error <= bounds.losses);
    }
  }
}

}  // namespace

TEST_CASE("gradients in fp32 on the GPU are those of the CPU in double", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  check_against_double<float>(device, stream.get);
}

TEST_CASE("gradients in bf16 on the GPU are near those of the CPU in double", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  check_against_double<__nv_bfloat16>(device, stream.get);
}

TEST_CASE("gradients on the GPU are the same bits again, and where activations are recomputed",
          "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  for (const Variant& v : variants()) {
    for (const Kind kind : {Kind::kFull, Kind::kLowRank, Kind::kCodebooks}) {
      CAPTURE(v.name, static_cast<int>(kind));
      using S = __nv_bfloat16;
      const Problem problem(v, 81);
      const auto model = random_model(v.config, 82);
      const auto run = [&](Activations activations) {
        return run_on_device<S>(v, problem, trainable<float>(model, kind), activations, device, stream.get);
      };
      const DeviceRun<S> first = run(Activations::kKept);
      for (const Activations activations : {Activations::kKept, Activations::kRecomputed}) {
        const DeviceRun<S> again = run(activations);
        CHECK(std::memcmp(first.losses.data(), again.losses.data(), first.losses.size() * sizeof(float)) ==
              0);
        int different = 0;
        for (std::size_t i = 0; i < first.model.parameters().size(); ++i) {
          const auto& a = first.model.parameters()[i].gradient;
          const auto& b = again.model.parameters()[i].gradient;
          different += std::memcmp(a.data(), b.data(), a.span().size_bytes()) == 0 ? 0 : 1;
        }
        CHECK(different == 0);
      }
    }
  }
}

TEST_CASE("gradients against a teacher are those of all labels by their chances", "[train][gpu]") {
  const Device device = gpu_or_skip();
  const Stream stream;
  codegemm::ThreadPool pool(4);
  for (const auto& [which, share] : {std::pair(0, 0.0), std::pair(1, 0.0), std::pair(1, 0.25)}) {
    const Variant v = variants()[static_cast<std::size_t>(which)];
    const ModelConfig& c = v.config;
    Problem problem(v, 91);
    problem.batch.loss_rows = {2, 9};
    problem.batch.labels.resize(2);
    const auto model = rounded_model<__nv_bfloat16>(c, 92);
    Rng rng(93);
    const std::vector<float> hidden = rng.normals(2 * c.hidden_size);
    std::vector<float> head = rng.normals(c.vocab_size * c.hidden_size);
    for (float& x : head) x *= 2.0F / std::sqrt(static_cast<float>(c.hidden_size));

    // Of -sum p log q the gradient is the sum over labels of p times that of -log q; a share is the text's.
    auto exact = trainable<double>(model, Kind::kCodebooks);
    auto pass = TrainPass<double>::create(c, std::ssize(problem.batch.tokens), 256, pool).value();
    double want_loss[2] = {};
    for (std::size_t row = 0; row < 2; ++row) {
      std::vector<double> p(static_cast<std::size_t>(c.vocab_size));
      double total = 0.0;
      for (std::size_t i = 0; i < p.size(); ++i) {
        double logit = 0.0;
        for (std::int64_t k = 0; k < c.hidden_size; ++k) {
          logit += static_cast<double>(
                       hidden[row * static_cast<std::size_t>(c.hidden_size) + static_cast<std::size_t>(k)]) *
                   static_cast<double>(
                       head[i * static_cast<std::size_t>(c.hidden_size) + static_cast<std::size_t>(k)]);
        }
        total += p[i] = std::exp(logit);
      }
      LossBatch<double> one = problem.batch;
      one.loss_rows = {problem.batch.loss_rows[row]};
      for (std::size_t i = 0; i < p.size(); ++i) {
        const double of_teacher = (1.0 - share) * p[i] / total;
        const double of_text = static_cast<std::int32_t>(i) == problem.batch.labels[row] ? share : 0.0;
        one.labels = {static_cast<std::int32_t>(i)};
        std::vector<double> loss;
        require_ok(pass.run(exact, one, true, of_teacher + of_text, loss));
        want_loss[row] += of_teacher * (std::log(p[i] / total) + loss[0]) + of_text * loss[0];
      }
    }

    auto got = trainable<float>(model, Kind::kCodebooks);
    const std::int64_t rows = std::ssize(problem.batch.tokens);
    auto on_gpu = DeviceTrainPass<float>::create(c, rows, 256, Activations::kKept, device, stream.get);
    require_ok(on_gpu.status());
    auto weights = DeviceTrainable<float>::create(got, device, stream.get);
    require_ok(weights.status());
    codegemm::cuda::DeviceArray<float> memory;
    DeviceLossBatch<float> batch = problem.on_device<float>(c, memory);
    const auto teacher = codegemm::cuda::DeviceArray<float>::copy_of(hidden).value();
    const auto teacher_head = codegemm::cuda::DeviceArray<float>::copy_of(head).value();
    batch.teacher = teacher.data();
    codegemm::test::DeviceBuffer<float> losses(2);
    losses.poison();
    CHECK(on_gpu->run(*weights, batch, 1.0F, losses.data()).code() == StatusCode::kNullPointer);
    batch.teacher_head = teacher_head.data();
    batch.label_share = 1.5;
    CHECK(on_gpu->run(*weights, batch, 1.0F, losses.data()).code() == StatusCode::kInvalidArgument);
    batch.label_share = share;
    for (int time = 0; time < 3; ++time) {  // the last one is a graph
      weights->zero_gradients(on_gpu->train_stream());
      require_ok(on_gpu->run(*weights, batch, 1.0F, losses.data()));
    }
    weights->collect(on_gpu->train_stream());
    require_ok(weights->download_gradients(got, on_gpu->train_stream()));
    CHECK(losses.guards_intact());
    const std::vector<float> got_loss = losses.download();
    double worst = 0.0;
    for (std::size_t i = 0; i < exact.parameters().size(); ++i)
      worst = std::max(worst, relative(got.parameters()[i].gradient, exact.parameters()[i].gradient));
    std::printf(
        "teacher, %s, labels' share %g: losses %.6f and %.6f, should be %.6f and %.6f; gradients off by "
        "%.2g\n",
        v.name, share, static_cast<double>(got_loss[0]), static_cast<double>(got_loss[1]), want_loss[0],
        want_loss[1], worst);
    for (std::size_t row = 0; row < 2; ++row)
      CHECK(std::abs(static_cast<double>(got_loss[row]) - want_loss[row]) <= 1e-5 * (1.0 + want_loss[row]));
    CHECK(worst <= 5e-5);
  }
}

}  // namespace prefillshare::test
