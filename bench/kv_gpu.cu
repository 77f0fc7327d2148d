// SPDX-License-Identifier: Apache-2.0
//
// bench/kv_gpu.cu - suite kv-gpu: attention over pages at the head shapes of Llama-3 8B and 70B: decode,
// decode with a shared prefix beside the plain path, over the same pages and over a copy for each sequence,
// and prefill; blocks to pinned host memory and back.
//
// Each time is the median of replays of a CUDA graph that holds many calls over different caches, 600 MB in
// all where one is smaller, so that no cache of the GPU holds them; divided by the number of calls. prepare()
// is once a step, not once a layer: it has a row of its own.
//
// usage: kv-gpu [--json FILE] [--quick] [--torch FILE]
//               [--only decode|decode-hnd|decode-fp8|shared|prefill|copies] [--lanes N] [--min-tiles N]
//               [--no-overlap] [--many-rows-cost PERCENT] [--tail-item-cost PERCENT] [--ordered-pages]
//   --ordered-pages  a sequence's pages lie one after the other, to see what it costs that they do not
//   --torch FILE  the times that bench/attention_peer.py wrote on this machine, as peers
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include <prefillshare/attention/decode.cuh>
#include <prefillshare/attention/prefill.cuh>
#include <prefillshare/attention/prefill_split.cuh>
#include <prefillshare/kv/cuda_copy_engine.cuh>

#include "support/gpu_program.hpp"
#include "support/gpu_timing.cuh"
#include "support/paged_caches.cuh"
#include "support/report.hpp"

namespace {

using namespace codegemm;
using namespace prefillshare::cuda;
using bench::AttentionShape;
using bench::Buffer;
using bench::check;
using bench::fill_values_kernel;
using bench::kModels;
using bench::kPageSize;
using bench::PagedCaches;
using bench::Peer;
using bench::Row;
using bench::time_us;

[[nodiscard]] std::string shape_of(const AttentionShape& model) {
  return concat(model.heads, "/", model.kv_heads, "/", model.head_dim);
}

struct Program {
  cuda::Device device;
  cudaStream_t stream = nullptr;
  bench::Suite suite;
  nlohmann::json torch;
  bool quick = false;
  DecodeTuning tuning;
  bool overlap = true;

  void add(Row row) {
    if (const auto it = torch.find(row.name + " " + row.shape + " " + row.config); it != torch.end()) {
      row.peers.push_back({"torch-sdpa", it->get<double>(), it->get<double>() / row.median_us});
    }
    std::printf("%-8s %-11s %-18s %9.2f us %6.0f GB/s %5.2f of read %6.1f TFLOP/s error %.1e",
                row.name.c_str(), row.shape.c_str(), row.config.c_str(), row.median_us, row.gb_per_s,
                row.share_of_read, row.tflop_per_s, row.error);
    for (const Peer& p : row.peers) std::printf("  %s %.1f us (x%.2f)", p.name.c_str(), p.median_us, p.ratio);
    std::printf("\n");
    std::fflush(stdout);
    suite.rows.push_back(std::move(row));
  }

  // us of a call and the error of the first.
  template <class C>
  std::pair<double, double> time_decode(const PagedCaches<C>& b, SharedPath path) {
    const std::int64_t cols = std::int64_t{b.model.heads} * b.model.head_dim;
    const auto elements = static_cast<std::size_t>(b.sequences * cols);
    Buffer<__half> q(elements);
    Buffer<__half> out(elements);
    fill_values_kernel<<<64, 256>>>(q.data, elements, 2);
    check(cudaMemset(out.data, 0xFF, elements * 2), "cudaMemset");
    Buffer<std::int32_t> group_indptr(std::vector<std::int32_t>{0, b.sequences});
    Buffer<std::int32_t> shared_pages(std::vector<std::int32_t>{b.shared / kPageSize});
    DecodeProblem<__half, __half, C> p;
    p.kv = b.pages_view();
    p.table = b.table(0);
    p.prefixes = {group_indptr.data, shared_pages.data, b.shared > 0 ? 1 : 0};
    p.q = MatrixView<const __half>(q.data, b.sequences, cols);
    p.out = MatrixView<__half>(out.data, b.sequences, cols);
    p.heads = b.model.heads;
    p.tuning = tuning;
    p.tuning.shared = path;
    const std::size_t size = workspace_bytes(p, device);
    Buffer<std::byte> workspace(size);
    check(prepare(p, device, workspace.data, size, stream));
    check(run(p, device, workspace.data, size, stream));
    check(cudaStreamSynchronize(stream), "decode");
    std::vector<Half> host(elements);
    check(cudaMemcpy(host.data(), out.data, elements * 2, cudaMemcpyDeviceToHost), "cudaMemcpy");
    const int last = b.sequences - 1;
    const double error = b.error_of(host, {0, last}, {0, last}, {b.tokens, b.tokens});
    const int launches = std::max(b.copies, b.bytes > 1e9 ? 4 : 8);
    p.overlap = overlap;
    const double us = time_us(stream, launches, quick ? 3 : 11, [&](int i) {
      p.table = b.table(i % b.copies);
      check(run(p, device, workspace.data, size, stream));
    });
    return {us, error};
  }

  template <class C>
  void decode(KvLayout layout) {
    const bool few = quick || layout == KvLayout::kHnd || sizeof(C) == 1;
    for (const AttentionShape& model : kModels) {
      for (const int tokens : {2048, 8192, 32768}) {
        for (const int sequences : {1, 4, 16, 64}) {
          if (few && (tokens == 8192 || sequences == 16)) continue;
          const PagedCaches<C> b(model, sequences, tokens, 0, 600e6, layout);
          const auto [us, error] = time_decode(b, SharedPath::kNever);
          Row row;
          row.name = sizeof(C) == 1 ? "decode-fp8" : layout == KvLayout::kNhd ? "decode" : "decode-hnd";
          row.shape = shape_of(model);
          row.config = concat("batch", sequences, "x", tokens);
          row.tokens = sequences;
          row.median_us = us;
          row.error = error;
          row.gb_per_s = b.bytes / us * 1e-3;
          row.share_of_read = row.gb_per_s / suite.memory.read_gb_per_s;
          add(row);
        }
      }
    }
  }

  void shared() {
    struct Point {
      int prefix;
      int sequences;
    };
    std::vector<Point> points;
    for (const int sequences : {2, 4, 8, 16, 32, 64}) points.push_back({4096, sequences});
    for (const int prefix : {256, 512, 1024, 2048, 16384}) {
      for (const int sequences : {2, 4, 16}) {
        if (!quick) points.push_back({prefix, sequences});
      }
    }
    for (const AttentionShape& model : kModels) {
      for (const Point point : points) {
        const PagedCaches<> b(model, point.sequences, point.prefix + 128, point.prefix, 600e6);
        const auto [us, error] = time_decode(b, SharedPath::kAlways);
        const double plain = time_decode(b, SharedPath::kNever).first;
        // What a system that does not share reads: the prefix once for each sequence, from pages of its own.
        const PagedCaches<> apart(model, point.sequences, point.prefix + 128, 0, 600e6);
        const double apart_us = time_decode(apart, SharedPath::kNever).first;
        Row row;
        row.name = "shared";
        row.shape = shape_of(model);
        row.config = concat("batch", point.sequences, "x", point.prefix, "+128");
        row.tokens = point.sequences;
        row.median_us = us;
        row.error = error;
        row.gb_per_s = b.bytes / us * 1e-3;
        row.share_of_read = row.gb_per_s / suite.memory.read_gb_per_s;
        row.peers.push_back({"plain", plain, plain / us});
        row.peers.push_back({"plain-copies", apart_us, apart_us / us});
        add(row);
      }
    }
  }

  void prefill() {
    struct Point {
      int tokens;
      int context;
    };
    for (const AttentionShape& model : kModels) {
      for (const Point point :
           {Point{2048, 2048}, Point{4096, 4096}, Point{8192, 8192}, Point{512, 8192}, Point{16, 1024},
            Point{16, 2048}, Point{16, 4096}, Point{16, 32768}, Point{64, 1024}, Point{64, 2048},
            Point{64, 4096}, Point{64, 8192}, Point{64, 32768}, Point{256, 32768}}) {
        const PagedCaches<> b(model, 1, point.context, 0, 0.0);
        const std::int64_t cols = std::int64_t{model.heads} * model.head_dim;
        const auto elements = static_cast<std::size_t>(point.tokens * cols);
        Buffer<__half> q(elements);
        Buffer<__half> out(elements);
        fill_values_kernel<<<1024, 256>>>(q.data, elements, 2);
        check(cudaMemset(out.data, 0xFF, elements * 2), "cudaMemset");
        Buffer<std::int32_t> query_indptr(std::vector<std::int32_t>{0, point.tokens});
        PrefillProblem<__half> p;
        p.kv = b.pages_view();
        p.table = b.table(0);
        p.query_indptr = query_indptr.data;
        p.q = MatrixView<const __half>(q.data, point.tokens, cols);
        p.out = MatrixView<__half>(out.data, point.tokens, cols);
        p.heads = model.heads;
        const bool splits = splits_keys(p, device);
        const std::size_t size = split_workspace_bytes(p, device);
        Buffer<std::byte> workspace(splits ? size : 0);
        if (splits) check(prepare_split(p, device, workspace.data, size, stream));
        const auto call = [&] {
          check(splits ? run_split(p, device, workspace.data, size, stream) : run(p, device, stream));
        };
        call();
        check(cudaStreamSynchronize(stream), "prefill");
        std::vector<Half> host(elements);
        check(cudaMemcpy(host.data(), out.data, elements * 2, cudaMemcpyDeviceToHost), "cudaMemcpy");
        const int past = point.context - point.tokens;
        std::vector<int> rows{0, point.tokens / 3, point.tokens - 1};
        std::vector<int> keys;
        for (const int r : rows) keys.push_back(past + r + 1);
        Row row;
        row.name = "prefill";
        row.error = b.error_of(host, rows, {0, 0, 0}, keys);
        row.shape = shape_of(model);
        row.config = concat(point.tokens, "of", point.context);
        row.tokens = point.tokens;
        row.median_us = time_us(stream, 4, quick ? 3 : 11, [&](int) { call(); });
        const double pairs = static_cast<double>(point.tokens) * (past + 0.5 * (point.tokens + 1.0));
        row.tflop_per_s = pairs * model.heads * model.head_dim * 4.0 / row.median_us * 1e-6;
        if (splits) {
          const double whole =
              time_us(stream, 4, quick ? 3 : 11, [&](int) { check(run(p, device, stream)); });
          row.peers.push_back({"not-split", whole, whole / row.median_us});
        } else if (device.arch == 90) {
          p.tuning.kernel = PrefillKernel::kMma;
          const double mma = time_us(stream, 4, quick ? 3 : 11, [&](int) { check(run(p, device, stream)); });
          row.peers.push_back({"mma.sync", mma, mma / row.median_us});
        }
        if (!splits && point.tokens * 16 <= point.context) {  // beside the split that was not chosen
          p.tuning = {};
          Buffer<std::byte> parts(size);
          check(prepare_split(p, device, parts.data, size, stream));
          const double split = time_us(stream, 4, quick ? 3 : 11,
                                       [&](int) { check(run_split(p, device, parts.data, size, stream)); });
          row.peers.push_back({"split", split, split / row.median_us});
        }
        add(row);
      }
    }
  }

  // Blocks of 16 tokens of Llama-3 8B (2 MB, of 32 pages) between device and pinned memory, until poll() has
  // seen the last; beside one copy of as many bytes that lie together.
  void copies() {
    constexpr std::int64_t kBlocks = 256;
    const prefillshare::KvShape shape{32, 8, 128, kPageSize};
    auto storage = prefillshare::cuda::DeviceKvStorage<__half>::create(shape, 2 * kBlocks, stream);
    check(storage.status());
    const auto bytes = static_cast<std::size_t>(kBlocks * storage->bytes_per_block());
    const auto words = bytes / sizeof(__half);
    fill_values_kernel<<<1024, 256, 0, stream>>>(storage->layer(0), 2 * words, 5);
    std::byte* pinned = nullptr;
    check(cudaMallocHost(reinterpret_cast<void**>(&pinned), bytes), "cudaMallocHost");
    prefillshare::cuda::CudaTiers tiers;
    tiers.memory = {pinned, bytes};
    tiers.queue_size = 64;
    check(cudaStreamCreateWithFlags(&tiers.out, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaStreamCreateWithFlags(&tiers.in, cudaStreamNonBlocking), "cudaStreamCreate");
    auto engine =
        prefillshare::cuda::CudaCopyEngine::create(prefillshare::cuda::device_blocks(*storage), tiers);
    check(engine.status());
    check(cudaDeviceSynchronize(), "fill");
    const auto median = [&](auto&& call) {
      std::vector<double> times;
      for (int i = 0; i < (quick ? 3 : 7); ++i) {
        const auto start = std::chrono::steady_clock::now();
        call();
        times.push_back(
            std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count());
      }
      std::sort(times.begin(), times.end());
      return times[times.size() / 2];
    };
    for (const bool leaves : {true, false}) {
      const double plain = median([&] {
        check(leaves ? cudaMemcpyAsync(pinned, storage->layer(0), bytes, cudaMemcpyDeviceToHost, tiers.out)
                     : cudaMemcpyAsync(storage->layer(0), pinned, bytes, cudaMemcpyHostToDevice, tiers.in),
              "cudaMemcpyAsync");
        check(cudaStreamSynchronize(leaves ? tiers.out : tiers.in), "copy");
      });
      const double us = median([&] {
        std::int64_t begun = 0;
        for (std::int64_t ended = 0; ended < kBlocks;) {
          while (begun < kBlocks && begun - ended < tiers.queue_size) {
            const auto slot = static_cast<std::int32_t>(begun);
            // Every second block of the device, so that no two pages of a copy lie together.
            const prefillshare::BlockPlace device_place{0, 2 * slot};
            const prefillshare::BlockPlace host_place{1, slot};
            check((*engine)->start(leaves ? device_place : host_place, leaves ? host_place : device_place,
                                   static_cast<std::uint64_t>(begun)));
            ++begun;
          }
          prefillshare::CopyResult result;
          while ((*engine)->poll(result)) {
            check(result.status);
            ++ended;
          }
        }
      });
      Row row;
      row.name = leaves ? "offload" : "reload";
      row.shape = "32x8x128";
      row.config = concat(kBlocks, " blocks");
      row.tokens = kBlocks * kPageSize;
      row.median_us = us;
      row.gb_per_s = static_cast<double>(bytes) / us * 1e-3;
      row.peers.push_back({"one-copy", plain, plain / us});
      add(row);
    }
    engine->reset();
    check(cudaFreeHost(pinned), "cudaFreeHost");
    check(cudaStreamDestroy(tiers.out), "cudaStreamDestroy");
    check(cudaStreamDestroy(tiers.in), "cudaStreamDestroy");
  }

  void time_prepare() {
    const PagedCaches<> b(kModels[0], 64, 2048, 0, 0.0);
    Buffer<__half> q(64 * 4096);
    DecodeProblem<__half> p;
    p.kv = b.pages_view();
    p.table = b.table(0);
    p.q = MatrixView<const __half>(q.data, 64, 4096);
    p.out = MatrixView<__half>(q.data, 64, 4096);
    p.heads = 32;
    const std::size_t size = workspace_bytes(p, device);
    Buffer<std::byte> workspace(size);
    Row row;
    row.name = "prepare";
    row.shape = "32/8/128";
    row.config = "batch64";
    row.median_us =
        time_us(stream, 16, 11, [&](int) { check(prepare(p, device, workspace.data, size, stream)); });
    add(row);
  }
};

int program(int argc, char** argv) {
  Program program;
  std::string json;
  std::string only;
  using bench::Option;
  bench::parse(argc, argv,
               {{"--quick", Option::flag(program.quick)},
                {"--ordered-pages", Option::flag(bench::ordered_pages)},
                {"--no-overlap", Option::flag(program.overlap, false)},
                {"--json", Option::value(json)},
                {"--only", Option::value(only)},
                {"--lanes", Option::value(program.tuning.lanes)},
                {"--min-tiles", Option::value(program.tuning.min_tiles)},
                {"--many-rows-cost", Option::value(program.tuning.many_rows_cost)},
                {"--tail-item-cost", Option::value(program.tuning.tail_item_cost)},
                {"--torch", Option::value([&](const char* path) {
                   std::ifstream file(path);
                   program.torch = nlohmann::json::parse(file);
                 })}});
  const auto device = cuda::query_device(0);
  check(device.status());
  program.device = *device;
  check(cudaStreamCreate(&program.stream), "cudaStreamCreate");
  program.suite.name = "kv-gpu";
  program.suite.machine = bench::describe_card(*device);
  program.suite.memory = bench::measure_bandwidth(program.stream, device->multiprocessors);
  std::printf("%s\ncopy %.0f GB/s, read %.0f GB/s\n", program.suite.machine.get<std::string>().c_str(),
              program.suite.memory.copy_gb_per_s, program.suite.memory.read_gb_per_s);
  const auto wanted = [&](const char* part) { return only.empty() || only == part; };
  if (wanted("decode")) program.decode<__half>(KvLayout::kNhd);
  if (wanted("decode-hnd")) program.decode<__half>(KvLayout::kHnd);
  if (wanted("decode-fp8")) program.decode<__nv_fp8_e4m3>(KvLayout::kNhd);
  if (wanted("decode")) program.time_prepare();
  if (wanted("shared")) program.shared();
  if (wanted("prefill")) program.prefill();
  if (wanted("copies")) program.copies();
  if (!json.empty()) check(bench::write_json(program.suite, json));
  check(cudaStreamDestroy(program.stream), "cudaStreamDestroy");
  return 0;
}

}  // namespace

int main(int argc, char** argv) { return codegemm::bench::run_suite("kv-gpu", argc, argv, program); }
