// SPDX-License-Identifier: Apache-2.0
//
// bench/codegemm_gpu.cu - suite codegemm-gpu: the GPU product at 1 to 8192 tokens, cold, beside its peers.
//
// Each time is the median of replays of a CUDA graph that holds many launches over different copies of the
// weights, 600 MB in all, so that no cache holds them; divided by the number of launches.
//
// usage: codegemm-gpu [--json FILE] [--quick] [--shape NxK]... [--format NAME]... [--tokens T]...
//                     [--peer NAME=LIBRARY]... [--no-cublas] [--regime gather|mma|wgmma] [--cluster N]
//                     [--ahead ROUNDS] [--shared BYTES] [--sets N] [--splits N] [--token-tile N]
//                     [--energy] [--once] [--merged]
//
// --merged times merged Q, K and V, and merged gate and up with SwiGLU, of Llama-3 8B and 70B instead of
// --shape, beside the plain product of one matrix of that size.
// --energy also measures the energy of each product, a second and a half for each; --once launches each
// product once and times nothing, for a profiler.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <cublas_v2.h>
#include <dlfcn.h>

#include <codegemm/cuda/dequantize.cuh>
#include <codegemm/gemm.cuh>

#include "support/gpu_energy.cuh"
#include "support/gpu_peer.h"
#include "support/gpu_problem.cuh"
#include "support/gpu_timing.cuh"
#include "support/report.hpp"

namespace {

using namespace codegemm;
using bench::Buffer;
using bench::check;
using bench::cold_copies;
using bench::error_of;
using bench::Option;
using bench::parse;
using bench::Shape;
using bench::time_us;

struct Peer {
  std::string name;
  decltype(&codegemm_peer_create) create;
  decltype(&codegemm_peer_run) run;
  decltype(&codegemm_peer_destroy) destroy;
};

Peer load_peer(const std::string& text) {
  const std::size_t eq = text.find('=');
  if (eq == std::string::npos) throw std::runtime_error("--peer wants NAME=LIBRARY");
  void* const library = dlopen(text.c_str() + eq + 1, RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) throw std::runtime_error(dlerror());
  const auto symbol = [&](const char* name) {
    void* const s = dlsym(library, name);
    if (s == nullptr) throw std::runtime_error(text + " lacks " + name);
    return s;
  };
  return Peer{text.substr(0, eq),
              reinterpret_cast<decltype(&codegemm_peer_create)>(symbol("codegemm_peer_create")),
              reinterpret_cast<decltype(&codegemm_peer_run)>(symbol("codegemm_peer_run")),
              reinterpret_cast<decltype(&codegemm_peer_destroy)>(symbol("codegemm_peer_destroy"))};
}

struct PeerTime {
  std::string name;
  double us;
  double error;
  std::optional<bench::Energy> energy = {};
};
struct Row {
  std::string name = "gemm";
  std::string shape;
  std::string config;
  int tokens;
  double us;
  double gb_per_s;
  double error;
  std::vector<PeerTime> peers;
  std::optional<bench::Energy> energy = {};
};

// How a product is measured.
struct Effort {
  bool quick = false;
  bool once = false;
  std::unique_ptr<bench::EnergyCounter> energy;

  int replays(int tokens) const { return tokens >= 512 || quick ? 5 : 20; }
  template <class Enqueue>
  double time(cudaStream_t stream, int launches, int tokens, Enqueue&& enqueue) const {
    return once ? 0.0 : time_us(stream, launches, replays(tokens), enqueue);
  }
  template <class Enqueue>
  std::optional<bench::Energy> energy_of(cudaStream_t stream, int launches, Enqueue&& enqueue) const {
    if (energy == nullptr || once) return {};
    return bench::measure_energy(*energy, stream, launches, 1.0, enqueue);
  }
};

// What a shape's products read and write.
struct Inputs {
  std::vector<Half> x;
  Buffer<Half> x_device;
  std::vector<Half> y;
  Buffer<Half> y_device;

  Inputs(Shape shape, const std::vector<int>& token_counts)
      : Inputs(shape, *std::max_element(token_counts.begin(), token_counts.end())) {}

 private:
  Inputs(Shape shape, int most)
      : x(bench::draw_tokens(most, shape.cols)),
        x_device(x),
        y(static_cast<std::size_t>(most * shape.rows)),
        y_device(y.size()) {}
};

int launches_of(int tokens, int copies) { return tokens >= 512 ? std::min(copies, 8) : std::max(copies, 8); }

// One product with cold weights: checked, then timed.
Row measure_ours(const bench::ColdMatrix& cold, Shape shape, Format format, int tokens, bool swiglu,
                 const cuda::GemmTuning& tuning, const Effort& effort, const cuda::Device& device,
                 cudaStream_t stream, Inputs& inputs) {
  const std::size_t y_bytes = inputs.y.size() * sizeof(Half);
  cuda::GemmProblem<Half, Half> p;
  p.x = MatrixView<const Half>(inputs.x_device.data, tokens, shape.cols);
  p.y = MatrixView<Half>(inputs.y_device.data, tokens, swiglu ? shape.rows / 2 : shape.rows);
  p.activation = swiglu ? cuda::Activation::kSwiGlu : cuda::Activation::kNone;
  p.tuning = tuning;
  p.weights = cold.view(0);
  const std::size_t workspace_bytes = cuda::workspace_bytes(p, device);
  Buffer<std::byte> workspace(workspace_bytes);
  check(cudaMemset(workspace.data, 0, std::max<std::size_t>(workspace_bytes, 1)), "cudaMemset");
  check(cudaMemset(inputs.y_device.data, 0xFF, y_bytes), "cudaMemset");
  check(cuda::run(p, device, workspace.data, workspace_bytes, stream));
  check(cudaStreamSynchronize(stream), "cudaStreamSynchronize");
  check(cudaMemcpy(inputs.y.data(), inputs.y_device.data, y_bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  Row row;
  row.error = error_of(cold.parts(), inputs.x, inputs.y, tokens, swiglu);
  const auto enqueue = [&](int i) {
    p.weights = cold.view(i);
    check(cuda::run(p, device, workspace.data, workspace_bytes, stream));
  };
  const int launches = launches_of(tokens, cold.copies());
  row.us = effort.time(stream, launches, tokens, enqueue);
  row.energy = effort.energy_of(stream, launches, enqueue);
  // All those launches over equal weights must have given the same bits as the first one.
  std::vector<Half> again(inputs.y.size());
  check(cudaMemcpy(again.data(), inputs.y_device.data, y_bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
  if (std::memcmp(again.data(), inputs.y.data(), y_bytes) != 0)
    throw std::runtime_error("two runs gave different results");
  row.shape = shape.name();
  row.config = format_name(format);
  row.tokens = tokens;
  double read = 0.0;
  for (const QuantizedMatrix& part : cold.parts())
    read += static_cast<double>(part.codes().size_bytes() + part.scales().size_bytes());
  row.gb_per_s = effort.once ? 0.0 : read / row.us * 1e-3;
  return row;
}

void print_row(const Row& row) {
  std::printf("%-7s %-12s %-10s T=%-4d %8.2f us %7.0f GB/s  error %.1e", row.name.c_str(), row.shape.c_str(),
              row.config.c_str(), row.tokens, row.us, row.gb_per_s, row.error);
  if (row.energy) std::printf("  %.0f uJ", row.energy->microjoules);
  for (const PeerTime& t : row.peers) {
    if (t.energy) std::printf("  %s %.0f uJ", t.name.c_str(), t.energy->microjoules);
    std::printf("  %s %.2f us (x%.2f, error %.1e)", t.name.c_str(), t.us, t.us / row.us, t.error);
  }
  std::printf("\n");
  std::fflush(stdout);
}

// Matrices merged along N, with SwiGLU or without, beside the plain product of one matrix of that size.
void measure_merged(const std::vector<Shape>& parts, bool swiglu, Format format,
                    const std::vector<int>& token_counts, const cuda::GemmTuning& tuning,
                    cuda::PackOptions pack_options, const Effort& effort, const cuda::Device& device,
                    cudaStream_t stream, std::vector<Row>& rows) {
  Shape shape{0, parts.front().cols};
  for (const Shape part : parts) shape.rows += part.rows;
  Inputs inputs(shape, token_counts);
  const bench::ColdMatrix merged(parts, format, pack_options, effort.once ? 1 : 0);
  const bench::ColdMatrix plain(shape, format, pack_options, effort.once ? 1 : 0);
  for (const int tokens : token_counts) {
    const auto ours = [&](const bench::ColdMatrix& cold, bool with_swiglu) {
      return measure_ours(cold, shape, format, tokens, with_swiglu, tuning, effort, device, stream, inputs);
    };
    Row row = ours(merged, swiglu);
    row.name = swiglu ? "swiglu" : "merged";
    const Row beside = ours(plain, false);
    row.peers.push_back({"plain", beside.us, beside.error, beside.energy});
    print_row(row);
    rows.push_back(std::move(row));
  }
}

void measure(Shape shape, Format format, const std::vector<int>& token_counts, const cuda::GemmTuning& tuning,
             cuda::PackOptions pack_options, const Effort& effort, const std::vector<Peer>& peers,
             cublasHandle_t cublas, const cuda::Device& device, cudaStream_t stream, std::vector<Row>& rows) {
  const bench::ColdMatrix cold(shape, format, pack_options, effort.once ? 1 : 0);
  const QuantizedMatrix& w = cold.matrix();
  const int copies = cold.copies();
  Inputs inputs(shape, token_counts);
  const Buffer<Half>& x_device = inputs.x_device;
  Buffer<Half>& y_device = inputs.y_device;
  std::vector<Half>& y = inputs.y;
  const std::size_t y_bytes = y.size() * sizeof(Half);
  const std::size_t first_row = rows.size();
  for (const int tokens : token_counts) {
    rows.push_back(measure_ours(cold, shape, format, tokens, false, tuning, effort, device, stream, inputs));
  }
  if (cublas != nullptr) {  // the same weights in fp16, fp32 sums
    const auto n = static_cast<int>(shape.rows);
    const auto k = static_cast<int>(shape.cols);
    const std::size_t weights16 = static_cast<std::size_t>(shape.rows * shape.cols);
    const int copies16 = effort.once ? 1 : cold_copies(weights16 * 2);
    Buffer<Half> w16(weights16 * static_cast<std::size_t>(copies16));
    for (int i = 0; i < copies16; ++i) {
      check(cuda::dequantize(cold.view(0),
                             MatrixView<Half>(w16.data + weights16 * static_cast<std::size_t>(i), n, k),
                             device, stream));
    }
    check(cublasSetStream(cublas, stream) == CUBLAS_STATUS_SUCCESS ? cudaSuccess : cudaErrorUnknown,
          "cuBLAS");
    for (std::size_t i = first_row; i < rows.size(); ++i) {
      Row& row = rows[i];
      const auto enqueue = [&](int j) {
        const float one = 1.0F;
        const float zero = 0.0F;
        const Half* const a = w16.data + weights16 * static_cast<std::size_t>(j % copies16);
        if (cublasGemmEx(cublas, CUBLAS_OP_T, CUBLAS_OP_N, n, row.tokens, k, &one, a, CUDA_R_16F, k,
                         x_device.data, CUDA_R_16F, k, &zero, y_device.data, CUDA_R_16F, n,
                         CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT) != CUBLAS_STATUS_SUCCESS) {
          throw std::runtime_error("cublasGemmEx failed");
        }
      };
      check(cudaMemset(y_device.data, 0xFF, y_bytes), "cudaMemset");
      enqueue(0);
      check(cudaStreamSynchronize(stream), "cublas");
      check(cudaMemcpy(y.data(), y_device.data, y_bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
      const double error = error_of(cold.parts(), inputs.x, y, row.tokens);
      const int calls = launches_of(row.tokens, copies16);
      row.peers.push_back({"cublas", effort.time(stream, calls, row.tokens, enqueue), error,
                           effort.energy_of(stream, calls, enqueue)});
    }
  }
  for (const Peer& peer : peers) {
    const codegemm_peer_matrix matrix{format.v,
                                      format.m,
                                      format.b,
                                      format.g,
                                      shape.rows,
                                      shape.cols,
                                      w.codes().data(),
                                      reinterpret_cast<const unsigned short*>(w.codebooks().data()),
                                      reinterpret_cast<const unsigned short*>(w.scales().data())};
    void* const handle = peer.create(&matrix, copies);
    if (handle == nullptr) continue;
    for (std::size_t i = first_row; i < rows.size(); ++i) {
      Row& row = rows[i];
      check(cudaMemset(y_device.data, 0xFF, y_bytes), "cudaMemset");
      if (peer.run(handle, 0, x_device.data, y_device.data, row.tokens, stream) != 0) continue;
      check(cudaStreamSynchronize(stream), peer.name.c_str());
      check(cudaMemcpy(y.data(), y_device.data, y_bytes, cudaMemcpyDeviceToHost), "cudaMemcpy");
      const double error = error_of(cold.parts(), inputs.x, y, row.tokens);
      const auto enqueue = [&](int j) {
        static_cast<void>(peer.run(handle, j % copies, x_device.data, y_device.data, row.tokens, stream));
      };
      const int calls = launches_of(row.tokens, copies);
      row.peers.push_back({peer.name, effort.time(stream, calls, row.tokens, enqueue), error,
                           effort.energy_of(stream, calls, enqueue)});
    }
    peer.destroy(handle);
  }
  for (std::size_t i = first_row; i < rows.size(); ++i) print_row(rows[i]);
}

void put_energy(nlohmann::json& row, const std::optional<bench::Energy>& energy) {
  if (!energy) return;
  row["microjoules"] = energy->microjoules;
  row["watts"] = energy->watts;
}

void write_json(const std::string& path, const std::string& machine, const bench::MemorySpeed& speed,
                const std::vector<Row>& rows) {
  nlohmann::json all = nlohmann::json::array();
  for (const Row& r : rows) {
    nlohmann::json peers = nlohmann::json::array();
    for (const PeerTime& t : r.peers) {
      peers.push_back({{"name", t.name}, {"median_us", t.us}, {"ratio", t.us / r.us}, {"error", t.error}});
      put_energy(peers.back(), t.energy);
    }
    all.push_back({{"name", r.name},
                   {"shape", r.shape},
                   {"config", r.config},
                   {"tokens", r.tokens},
                   {"median_us", r.us},
                   {"gb_per_s", r.gb_per_s},
                   {"share_of_read", r.gb_per_s / speed.read_gb_per_s},
                   {"error", r.error},
                   {"peers", peers}});
    put_energy(all.back(), r.energy);
  }
  const bench::Suite suite{"codegemm-gpu", machine, speed, {}};
  check(bench::write_text(bench::frame_json(suite, std::move(all)).dump(2) + '\n', path));
}

cuda::Regime parse_regime(const std::string& name) {
  if (name == "gather") return cuda::Regime::kGather;
  if (name == "mma") return cuda::Regime::kFusedMma;
  if (name == "wgmma") return cuda::Regime::kFusedWgmma;
  throw std::runtime_error("--regime wants gather, mma or wgmma, not " + name);
}

int program(int argc, char** argv) {
  std::vector<Shape> shapes;
  std::vector<Format> formats;
  std::vector<int> tokens;
  std::vector<Peer> peers;
  cuda::GemmTuning tuning;
  cuda::PackOptions pack_options;
  std::string json;
  Effort effort;
  bool with_cublas = true;
  bool merged = false;
  parse(argc, argv,
        {{"--quick", Option::flag(effort.quick)},
         {"--once", Option::flag(effort.once)},
         {"--energy", Option::flag([&] { effort.energy = std::make_unique<bench::EnergyCounter>(); })},
         {"--merged", Option::flag(merged)},
         {"--no-cublas", Option::flag(with_cublas, false)},
         {"--json", Option::value(json)},
         {"--shape", bench::shape_option(shapes)},
         {"--format", bench::format_option(formats)},
         {"--tokens", Option::value([&](const char* text) { tokens.push_back(std::atoi(text)); })},
         {"--peer", Option::value([&](const char* text) { peers.push_back(load_peer(text)); })},
         {"--cluster", Option::value(tuning.cluster)},
         {"--ahead", Option::value(tuning.rounds_ahead)},
         {"--shared", Option::value(tuning.shared_bytes)},
         {"--regime", Option::value([&](const char* text) { tuning.regime = parse_regime(text); })},
         {"--splits", Option::value(tuning.splits)},
         {"--token-tile", Option::value(tuning.token_tile)},
         {"--sets", Option::value(pack_options.sets)}});
  if (shapes.empty()) {
    shapes = {{4096, 4096}, {1024, 4096},  {6144, 4096},  {14336, 4096}, {28672, 4096}, {4096, 14336},
              {8192, 8192}, {10240, 8192}, {28672, 8192}, {57344, 8192}, {8192, 28672}};
  }
  if (formats.empty())
    formats = {{4, 1, 8, 128}, {8, 2, 8, 128}, {4, 1, 8, 32}, {8, 2, 8, -1}, {8, 1, 16, -1}};
  if (tokens.empty()) tokens = {1, 2, 4, 8, 16, 32, 64, 512, 2048, 8192};

  const auto device = cuda::query_device(0);
  check(device.status());
  const std::string machine = bench::describe_card(*device);
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  const bench::MemorySpeed bandwidth =
      effort.once ? bench::MemorySpeed{} : bench::measure_bandwidth(stream, device->multiprocessors);
  std::printf("%s\ncopy %.0f GB/s, read %.0f GB/s\n", machine.c_str(), bandwidth.copy_gb_per_s,
              bandwidth.read_gb_per_s);
  cublasHandle_t cublas = nullptr;
  if (with_cublas && cublasCreate(&cublas) != CUBLAS_STATUS_SUCCESS)
    throw std::runtime_error("cublasCreate failed");
  std::vector<Row> rows;
  for (const Format format : formats) {
    if (merged) {
      const std::pair<std::vector<Shape>, bool> all[] = {{{{4096, 4096}, {1024, 4096}, {1024, 4096}}, false},
                                                         {{{8192, 8192}, {1024, 8192}, {1024, 8192}}, false},
                                                         {{{14336, 4096}, {14336, 4096}}, true},
                                                         {{{28672, 8192}, {28672, 8192}}, true}};
      for (const auto& [parts, swiglu] : all) {
        measure_merged(parts, swiglu, format, tokens, tuning, pack_options, effort, *device, stream, rows);
        if (!json.empty()) write_json(json, machine, bandwidth, rows);
      }
      continue;
    }
    for (const Shape shape : shapes) {
      measure(shape, format, tokens, tuning, pack_options, effort, peers, cublas, *device, stream, rows);
      if (!json.empty()) write_json(json, machine, bandwidth, rows);
    }
  }
  if (cublas != nullptr) cublasDestroy(cublas);
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return codegemm::bench::run_suite("codegemm-gpu", argc, argv, program); }
