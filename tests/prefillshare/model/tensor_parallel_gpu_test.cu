// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/model/tensor_parallel_gpu_test.cu - groups of ranks and models spread over them: sums
// and gathers against plain loops; a model of one rank has the plain one's bits, one of several its numbers.
// The ranks of a PeerGroup are streams of one GPU, or GPUs where there are several; NCCL's need a GPU each.

// What nvcc's front end remarks on in Eigen and in the CPU's kernels.
#pragma nv_diag_suppress 20012, 1675, 550

#include <prefillshare/model/cuda/modules.cuh>
#include <prefillshare/model/cuda/peer_group.cuh>
#include <prefillshare/model/cuda/tensor_parallel.cuh>
#include <prefillshare/model/shard_layers.hpp>
#ifdef PREFILLSHARE_WITH_NCCL
#include <prefillshare/model/cuda/nccl_group.cuh>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "../gpu_model.cuh"

namespace prefillshare::test {
namespace {

using codegemm::test::gpu_or_skip;
using codegemm::test::require_ok;
using codegemm::test::seed_or;

// Ranks that share a GPU wait for one another: none may be kept out by the streams' sharing a queue or by a
// kernel that is loaded meanwhile. Read at the first CUDA call.
const bool kEnvironment = [] {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 1);
  setenv("CUDA_MODULE_LOADING", "EAGER", 1);
  return true;
}();

// Mailboxes, streams and groups of ranks. With `spread` rank r is on GPU r; else all are on the first.
struct PeerRig {
  std::vector<int> devices;
  std::vector<void*> mailboxes;
  std::vector<cudaStream_t> streams;
  std::vector<cuda::PeerGroup> groups;

  PeerRig(int ranks, bool spread, const cuda::PeerGroup::Options& options) {
    for (int r = 0; r < ranks; ++r) {
      devices.push_back(spread ? r : 0);
      use(r);
      for (int p = 0; spread && p < ranks; ++p) {
        if (p == r) continue;
        const cudaError_t code = cudaDeviceEnablePeerAccess(p, 0);
        if (code != cudaErrorPeerAccessAlreadyEnabled) REQUIRE_CUDA(code);
        static_cast<void>(cudaGetLastError());
      }
      void* box = nullptr;
      const std::size_t bytes = cuda::PeerGroup::mailbox_bytes(ranks, options.most);
      REQUIRE_CUDA(cudaMalloc(&box, bytes));
      REQUIRE_CUDA(cudaMemset(box, 0, bytes));
      mailboxes.push_back(box);
      cudaStream_t stream = nullptr;
      REQUIRE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
      streams.push_back(stream);
      REQUIRE_CUDA(cudaDeviceSynchronize());
    }
    for (int r = 0; r < ranks; ++r) {
      use(r);
      groups.push_back(take(cuda::PeerGroup::create(
          r, mailboxes, take(codegemm::cuda::query_device(devices[at(r)])), options)));
    }
  }
  PeerRig(const PeerRig&) = delete;
  PeerRig& operator=(const PeerRig&) = delete;
  ~PeerRig() {
    for (std::size_t r = 0; r < devices.size(); ++r) {
      cudaSetDevice(devices[r]);
      cudaDeviceSynchronize();
      cudaFree(mailboxes[r]);
      cudaStreamDestroy(streams[r]);
    }
    cudaSetDevice(0);
  }
  static std::size_t at(int r) { return static_cast<std::size_t>(r); }
  void use(int r) const { REQUIRE_CUDA(cudaSetDevice(devices[at(r)])); }
  int ranks() const { return static_cast<int>(devices.size()); }
};

// Ranks and whether each has a GPU of its own: what this machine can do.
std::vector<std::pair<int, bool>> arrangements() {
  std::vector<std::pair<int, bool>> out{{1, false}, {2, false}, {4, false}};
  for (const int ranks : {2, 4, 8}) {
    if (ranks <= gpu_count()) out.emplace_back(ranks, true);
  }
  return out;
}

void check_sum(PeerRig& rig, std::int64_t count, Rng& rng) {
  const int ranks = rig.ranks();
  std::vector<std::vector<float>> values;
  std::vector<cuda::DeviceArray<float>> arrays;
  for (int r = 0; r < ranks; ++r) {
    rig.use(r);
    values.push_back(rng.normals(count));
    arrays.push_back(take(cuda::DeviceArray<float>::copy_of(values.back())));
  }
  for (int r = 0; r < ranks; ++r) {
    rig.use(r);
    require_ok(rig.groups[rig.at(r)].sum(MatrixView<float>(arrays[rig.at(r)].data(), 1, count),
                                         rig.streams[rig.at(r)]));
  }
  std::vector<float> want(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < want.size(); ++i) {
    float sum = values[0][i];
    for (std::size_t r = 1; r < values.size(); ++r) sum += values[r][i];
    want[i] = sum;
  }
  for (int r = 0; r < ranks; ++r) {
    rig.use(r);
    require_ok(rig.groups[rig.at(r)].check(rig.streams[rig.at(r)]));
    std::vector<float> got(want.size(), NAN);
    REQUIRE_CUDA(
        cudaMemcpy(got.data(), arrays[rig.at(r)].data(), got.size() * sizeof(float), cudaMemcpyDeviceToHost));
    CAPTURE(ranks, count, r);
    CHECK(std::memcmp(got.data(), want.data(), got.size() * sizeof(float)) == 0);
  }
}

void check_gather(PeerRig& rig, std::int64_t rows, std::int64_t width, std::int64_t stride, Rng& rng) {
  const int ranks = rig.ranks();
  const auto size = static_cast<std::size_t>(rows * stride);
  std::vector<float> want = rng.normals(rows * stride);
  std::vector<cuda::DeviceArray<float>> arrays;
  for (int r = 0; r < ranks; ++r) {
    rig.use(r);
    std::vector<float> own(size, NAN);
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < stride; ++j) {
        const bool mine = j >= r * width && j < (r + 1) * width;
        const bool beyond = j >= ranks * width;
        const auto k = static_cast<std::size_t>(i * stride + j);
        if (mine || beyond) own[k] = want[k];
      }
    }
    arrays.push_back(take(cuda::DeviceArray<float>::copy_of(own)));
  }
  for (int r = 0; r < ranks; ++r) {
    rig.use(r);
    require_ok(rig.groups[rig.at(r)].gather(
        MatrixView<float>(arrays[rig.at(r)].data(), rows, ranks * width, stride), rig.streams[rig.at(r)]));
  }
  for (int r = 0; r < ranks; ++r) {
    rig.use(r);
    require_ok(rig.groups[rig.at(r)].check(rig.streams[rig.at(r)]));
    std::vector<float> got(size, NAN);
    REQUIRE_CUDA(
        cudaMemcpy(got.data(), arrays[rig.at(r)].data(), size * sizeof(float), cudaMemcpyDeviceToHost));
    CAPTURE(ranks, rows, width, stride, r);
    CHECK(std::memcmp(got.data(), want.data(), size * sizeof(float)) == 0);
  }
}

// Heads and columns that four ranks share evenly.
ModelConfig parallel_config() {
  ModelConfig c = gpu_config();
  c.vocab_size = 208;
  c.intermediate_size = 512;
  c.layers = 3;
  c.heads = 8;
  c.kv_heads = 4;
  c.tied_embeddings = false;
  return c;
}

// Random codes for the layers of `dense`; the head as it is.
LlamaModel<CodeGemmLinear> coded_model(const LlamaModel<DenseLinear>& dense, codegemm::Format format,
                                       std::uint64_t seed) {
  Rng rng(seed);
  const auto code = [&](const DenseLinear& layer) {
    auto matrix = take(codegemm::QuantizedMatrix::create(format, layer.rows(), layer.cols()));
    for (std::int64_t m = 0; m < format.m; ++m) {
      for (std::int64_t n = 0; n < layer.rows(); ++n) {
        for (std::int64_t j = 0; j < layer.cols() / format.v; ++j)
          matrix.set_code(m, n, j, static_cast<std::uint32_t>(rng.below(format.centroids())));
      }
    }
    for (auto& value : matrix.codebooks()) value = codegemm::Half::from_float(rng.normal());
    const float size = 1.0F / std::sqrt(static_cast<float>(layer.cols() * format.m));
    for (auto& value : matrix.scales()) value = codegemm::Half::from_float(size * rng.uniform(0.8F, 1.2F));
    return CodeGemmLinear(take(codegemm::pack(matrix.view())),
                          std::vector<float>(layer.bias().begin(), layer.bias().end()));
  };
  LlamaModel<CodeGemmLinear> out;
  out.config = dense.config;
  out.embedding = dense.embedding;
  out.final_norm = dense.final_norm;
  for (const LlamaLayer<DenseLinear>& layer : dense.layers) {
    LlamaLayer<CodeGemmLinear> low;
    low.input_norm = layer.input_norm;
    low.post_attention_norm = layer.post_attention_norm;
    low.q_norm = layer.q_norm;
    low.k_norm = layer.k_norm;
    low.q = code(layer.q), low.k = code(layer.k), low.v = code(layer.v), low.o = code(layer.o);
    low.gate = code(layer.gate), low.up = code(layer.up), low.down = code(layer.down);
    out.layers.push_back(std::move(low));
  }
  return out;
}

struct FewConfigs {
  using Gather = codegemm::config_list<codegemm::cuda::GatherAny<1, 4>>;
  using Fused = codegemm::config_list<codegemm::cuda::Fused<4, 1, 0>>;
};
using DenseUpload = cuda::DenseUploader<__half>;
using CodedUpload = cuda::CodeGemmUploader<__half, FewConfigs>;

// One rank's model. A whole model is rank 0 of 1 without a group.
template <class HostLinear, class Upload, class UploadHead>
auto build(const LlamaModel<HostLinear>& host, const DenseLinear& head, ModelShard part, Upload upload,
           UploadHead upload_head) {
  cuda::DeviceLlamaBuilder<Upload, UploadHead> builder(take(shard_config(host.config, part)), upload,
                                                       upload_head);
  require_ok(builder.set_ends(*host.embedding, host.final_norm));
  for (const LlamaLayer<HostLinear>& layer : host.layers)
    require_ok(builder.add_layer(take(shard_layer(layer, part))));
  require_ok(builder.add_head(take(shard_outputs(head, part))));
  return take(builder.finish());
}

constexpr std::int64_t kPrompt = 37;
constexpr int kSteps = 6;

// What a rank needs to run: prefill of a prompt, then steps of the graph.
template <class Model>
struct Runner {
  using Graph = cuda::DecodeGraph<typename Model::Linear, typename Model::Head>;
  std::shared_ptr<const Model> model;
  cuda::Device device;
  cudaStream_t stream;
  cuda::DeviceKvStorage<__half> storage;
  std::unique_ptr<cuda::DeviceKvAllocator<__half>> allocator;
  cuda::DeviceWorkspace<__half> workspace;
  cuda::PrefillBatch input;
  Sequence sequence;
  std::unique_ptr<Graph> graph;

  Runner(std::shared_ptr<const Model> model_, const cuda::Device& device_, cudaStream_t stream_)
      : model(std::move(model_)),
        device(device_),
        stream(stream_),
        storage(take(cuda::DeviceKvStorage<__half>::create(kv_shape(model->config), 16, stream))),
        allocator(take(cuda::DeviceKvAllocator<__half>::create(storage))),
        workspace(take(cuda::DeviceWorkspace<__half>::create(*model, 64, 1, device))),
        input(take(cuda::PrefillBatch::create(64, 1, 16))) {
    REQUIRE_CUDA(cudaMemset(storage.layer(0), 0xFF,
                            static_cast<std::size_t>(storage.blocks() * storage.bytes_per_block())));
    sequence = take(allocator->open(CacheKey{"m", "1", ""}, {}));
    require_ok(allocator->reserve(sequence, kPrompt + kSteps));
    graph = take(Graph::capture(*model, storage, workspace, 1, 16, false, device, stream));
    REQUIRE_CUDA(cudaDeviceSynchronize());
  }
  ~Runner() { static_cast<void>(allocator->release_reserved(sequence)); }
  void prefill(std::span<const std::int32_t> prompt) {
    const Sequence* const one = &sequence;
    const auto batch =
        take(input.send(std::span(&prompt, 1), std::span(&one, 1), model->config.vocab_size, stream));
    require_ok(cuda::forward(*model, batch, storage,
                             MatrixView<float>(workspace.logits.data(), 1, model->config.vocab_size),
                             workspace, device, stream));
  }
  void step(std::int64_t k, std::int32_t token) {
    const Sequence* const one = &sequence;
    const std::int64_t pending = kPrompt + k + 1;
    PageTable table;
    require_ok(export_page_table(std::span(&one, 1), table, std::span(&pending, 1)));
    cuda::DecodeStep what;
    what.table = &table;
    what.tokens = std::span(&token, 1);
    require_ok(graph->launch(what));
  }
  std::vector<float> logits() {
    std::vector<float> out(static_cast<std::size_t>(model->config.vocab_size), NAN);
    REQUIRE_CUDA(cudaStreamSynchronize(stream));
    REQUIRE_CUDA(
        cudaMemcpy(out.data(), workspace.logits.data(), out.size() * sizeof(float), cudaMemcpyDeviceToHost));
    return out;
  }
};

// The logits behind the prompt and behind each step.
template <class Model>
std::vector<std::vector<float>> run_alone(Runner<Model>& runner, std::span<const std::int32_t> prompt,
                                          std::span<const std::int32_t> given) {
  std::vector<std::vector<float>> out;
  runner.prefill(prompt);
  out.push_back(runner.logits());
  for (int k = 0; k < kSteps; ++k) {
    runner.step(k, given[static_cast<std::size_t>(k)]);
    out.push_back(runner.logits());
  }
  return out;
}

template <class HostLinear, class Upload>
void check_parallel(const LlamaModel<HostLinear>& host, const DenseLinear& head, Upload (*make_upload)(),
                    int ranks, bool spread, std::uint64_t seed) {
  CAPTURE(ranks, spread);
  Rng rng(seed);
  const auto prompt = random_tokens(rng, kPrompt, host.config.vocab_size);
  const auto given = random_tokens(rng, kSteps, host.config.vocab_size);
  cuda::PeerGroup::Options options;
  options.most = 1 << 16;
  options.timeout_ns = 2'000'000'000;
  PeerRig rig(ranks, spread, options);
  using HeadUpload = DenseUpload;
  const auto device = take(codegemm::cuda::query_device(0));

  rig.use(0);
  auto whole = build(host, head, {}, make_upload(), HeadUpload(take(cuda::Cublas::create())));
  Runner<std::remove_const_t<typename decltype(whole)::element_type>> alone(whole, device, rig.streams[0]);
  const auto want = run_alone(alone, prompt, given);

  using Parallel = cuda::ParallelUploader<Upload, cuda::PeerGroup>;
  using ParallelHead = cuda::ParallelHeadUploader<HeadUpload, cuda::PeerGroup>;
  using Model = typename cuda::DeviceLlamaBuilder<Parallel, ParallelHead>::Model;
  std::vector<std::unique_ptr<Runner<Model>>> runners;
  for (int r = 0; r < ranks; ++r) {
    rig.use(r);
    const cuda::PeerGroup& group = rig.groups[rig.at(r)];
    auto part = build(host, head, {ranks, r}, Parallel(make_upload(), group),
                      ParallelHead(HeadUpload(take(cuda::Cublas::create())), group));
    runners.push_back(std::make_unique<Runner<Model>>(
        part, take(codegemm::cuda::query_device(rig.devices[rig.at(r)])), rig.streams[rig.at(r)]));
  }
  // Once with groups that wait for nobody: whatever is loaded or made at a first call is there then.
  const std::vector<cuda::PeerGroup> real = rig.groups;
  for (int r = 0; r < ranks; ++r) {
    rig.use(r);
    auto scratch =
        take(cuda::DeviceArray<std::byte>::zeros(cuda::PeerGroup::mailbox_bytes(ranks, options.most)));
    const std::vector<void*> boxes(static_cast<std::size_t>(ranks), scratch.data());
    cuda::PeerGroup::Options impatient = options;
    impatient.timeout_ns = 1;
    rig.groups[rig.at(r)] = take(cuda::PeerGroup::create(r, boxes, device, impatient));
    runners[rig.at(r)]->prefill(prompt);
    REQUIRE_CUDA(cudaDeviceSynchronize());
    rig.groups[rig.at(r)] = real[rig.at(r)];
  }
  for (int k = -1; k < kSteps; ++k) {
    for (int r = 0; r < ranks; ++r) {
      rig.use(r);
      if (k < 0) {
        runners[rig.at(r)]->prefill(prompt);
      } else {
        runners[rig.at(r)]->step(k, given[static_cast<std::size_t>(k)]);
      }
    }
    const std::vector<float>& expected = want[static_cast<std::size_t>(k + 1)];
    std::vector<double> row(expected.begin(), expected.end());
    std::vector<float> first;
    for (int r = 0; r < ranks; ++r) {
      rig.use(r);
      require_ok(rig.groups[rig.at(r)].check(rig.streams[rig.at(r)]));
      const std::vector<float> got = runners[rig.at(r)]->logits();
      CAPTURE(k, r);
      if (ranks == 1) {
        CHECK(std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) == 0);
      } else {
        CHECK(worst_relative(got, {row}) < 6e-3);  // activations are rounded to fp16, other sums' order
      }
      if (r == 0) first = got;
      CHECK(std::memcmp(got.data(), first.data(), got.size() * sizeof(float)) == 0);
    }
  }
  for (int r = 0; r < ranks; ++r) {
    rig.use(r);
    runners[rig.at(r)].reset();
  }
  rig.use(0);
}

DenseUpload dense_upload() { return DenseUpload(take(cuda::Cublas::create())); }
CodedUpload coded_upload() { return CodedUpload(); }

}  // namespace

TEST_CASE("a peer group sums and gathers as plain loops do, to the bit, on every rank") {
  static_cast<void>(gpu_or_skip());
  Rng rng(seed_or(811));
  for (const auto& [ranks, spread] : arrangements()) {
    cuda::PeerGroup::Options options;
    options.most = 5000;
    PeerRig rig(ranks, spread, options);
    for (int round = 0; round < 3; ++round) {
      for (const std::int64_t count : {1, 2, 3, 511, 512, 513, 4096, 5000, 5001, 16385, 70001}) {
        check_sum(rig, count, rng);
      }
      check_gather(rig, 1, 1, ranks, rng);
      check_gather(rig, 3, 7, 7 * ranks + 2, rng);
      check_gather(rig, 5, 1024, 1024 * ranks, rng);
      check_gather(rig, 2, 9001, 9001 * ranks, rng);
    }
  }
}

TEST_CASE("a captured sum of a peer group may be replayed as often as wanted") {
  static_cast<void>(gpu_or_skip());
  constexpr std::int64_t kCount = 3000;
  PeerRig rig(2, gpu_count() >= 2, {});
  std::vector<cuda::DeviceArray<float>> arrays;
  std::vector<cudaGraphExec_t> graphs;
  for (int r = 0; r < 2; ++r) {
    rig.use(r);
    arrays.push_back(take(
        cuda::DeviceArray<float>::copy_of(std::vector<float>(kCount, static_cast<float>(r + 1) * 0.5F))));
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    REQUIRE_CUDA(cudaStreamBeginCapture(rig.streams[rig.at(r)], cudaStreamCaptureModeThreadLocal));
    for (int i = 0; i < 3; ++i)
      require_ok(rig.groups[rig.at(r)].sum(MatrixView<float>(arrays.back().data(), 1, kCount),
                                           rig.streams[rig.at(r)]));
    REQUIRE_CUDA(cudaStreamEndCapture(rig.streams[rig.at(r)], &graph));
    REQUIRE_CUDA(cudaGraphInstantiate(&exec, graph, 0));
    REQUIRE_CUDA(cudaGraphDestroy(graph));
    graphs.push_back(exec);
  }
  // 1.5, then doubled twice a replay and once between two: a power of two, exact.
  float want = 1.5F / 2;
  for (int i = 0; i < 20; ++i) {
    for (int r = 0; r < 2; ++r) {
      rig.use(r);
      REQUIRE_CUDA(cudaGraphLaunch(graphs[rig.at(r)], rig.streams[rig.at(r)]));
    }
    want *= 8;
  }
  for (int r = 0; r < 2; ++r) {
    rig.use(r);
    require_ok(rig.groups[rig.at(r)].check(rig.streams[rig.at(r)]));
    std::vector<float> got(kCount, NAN);
    REQUIRE_CUDA(
        cudaMemcpy(got.data(), arrays[rig.at(r)].data(), got.size() * sizeof(float), cudaMemcpyDeviceToHost));
    CAPTURE(r, got[0], want);
    CHECK(std::all_of(got.begin(), got.end(), [&](float x) { return x == want; }));
    cudaGraphExecDestroy(graphs[rig.at(r)]);
  }
}

TEST_CASE("a peer that does not answer is named, and keeps nobody waiting twice") {
  static_cast<void>(gpu_or_skip());
  cuda::PeerGroup::Options options;
  options.most = 1024;
  options.timeout_ns = 20'000'000;
  PeerRig rig(2, false, options);
  auto data = take(cuda::DeviceArray<float>::zeros(1024));
  for (int i = 0; i < 100; ++i)
    require_ok(rig.groups[1].sum(MatrixView<float>(data.data(), 1, 1024), rig.streams[1]));
  const Status status = rig.groups[1].check(rig.streams[1]);
  CHECK(status.code() == StatusCode::kIoError);
  CHECK(status.message().find("rank 0 did not answer rank 1") != std::string::npos);
}

TEST_CASE("peer groups and parallel layers refuse what does not fit, with the numbers") {
  const auto device = gpu_or_skip();
  void* boxes[2] = {reinterpret_cast<void*>(0x1000), nullptr};
  const auto code = [&](int rank, std::span<void* const> of, cuda::PeerGroup::Options options = {}) {
    return cuda::PeerGroup::create(rank, of, device, options).status().code();
  };
  CHECK(code(0, boxes) == StatusCode::kNullPointer);
  CHECK(code(2, boxes) == StatusCode::kInvalidArgument);
  CHECK(code(0, {}) == StatusCode::kInvalidArgument);
  boxes[1] = reinterpret_cast<void*>(0x1010);
  CHECK(code(0, boxes) == StatusCode::kMisaligned);
  boxes[1] = reinterpret_cast<void*>(0x2000);
  const auto group = take(cuda::PeerGroup::create(0, boxes, device, {}));
  float* const some = reinterpret_cast<float*>(0x4000);
  CHECK(group.sum(MatrixView<float>(some, 2, 3, 4), nullptr).code() == StatusCode::kShapeMismatch);
  CHECK(group.gather(MatrixView<float>(some, 2, 3), nullptr).code() == StatusCode::kShapeMismatch);
  using Layer = cuda::ParallelLinear<cuda::DeviceDenseLinear<__half>, cuda::PeerGroup>;
  const Layer summed = Layer::by_inputs({}, group);
  CHECK(summed.forward({}, {}, {}).code() == StatusCode::kUnsupported);
  CHECK(summed.gated({}, {}, {}).code() == StatusCode::kUnsupported);
}

TEST_CASE("a model of dense layers spread over ranks has the whole one's logits") {
  static_cast<void>(gpu_or_skip());
  const std::uint64_t seed = seed_or(821);
  ModelConfig config = parallel_config();
  SECTION("Llama") {}
  SECTION("biases and head norms") {
    config.attention_bias = true;
    config.qk_norm = true;
  }
  CAPTURE(seed);
  const auto host = rounded_model<__half>(config, seed);
  for (const auto& [ranks, spread] : arrangements()) {
    // Four on one GPU leave the last one's cuBLAS kernels no place while the others wait for it.
    if (ranks > (spread ? 4 : 2)) continue;
    check_parallel(*host, host->head, dense_upload, ranks, spread, seed + 1);
  }
}

TEST_CASE("a model of codes spread over ranks has the whole one's logits") {
  static_cast<void>(gpu_or_skip());
  const std::uint64_t seed = seed_or(831);
  CAPTURE(seed);
  const auto dense = rounded_model<__half>(parallel_config(), seed);
  const auto coded = coded_model(*dense, codegemm::parse_format("m1v4g128").value(), seed + 1);
  for (const auto& [ranks, spread] : arrangements()) {
    if (ranks > 4) continue;
    check_parallel(coded, dense->head, coded_upload, ranks, spread, seed + 2);
  }
}

#ifdef PREFILLSHARE_WITH_NCCL
TEST_CASE("a model of one rank of NCCL has the plain one's bits, in a graph too") {
  const auto device = gpu_or_skip();
  const std::uint64_t seed = seed_or(841);
  Rng rng(seed);
  ncclUniqueId id;
  REQUIRE(ncclGetUniqueId(&id) == ncclSuccess);
  ncclComm_t comm = nullptr;
  REQUIRE(ncclCommInitRank(&comm, 1, id, 0) == ncclSuccess);
  const auto group = take(cuda::NcclGroup::create(comm));
  CHECK(group.rank() == 0);
  CHECK(group.ranks() == 1);
  cudaStream_t stream = nullptr;
  REQUIRE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  {
    const auto host = rounded_model<__half>(parallel_config(), seed);
    const auto prompt = random_tokens(rng, kPrompt, host->config.vocab_size);
    const auto given = random_tokens(rng, kSteps, host->config.vocab_size);
    auto whole = build(*host, host->head, {}, dense_upload(), dense_upload());
    Runner<std::remove_const_t<typename decltype(whole)::element_type>> alone(whole, device, stream);
    auto part = build(*host, host->head, {}, cuda::ParallelUploader(dense_upload(), group),
                      cuda::ParallelHeadUploader(dense_upload(), group));
    auto warm = take(cuda::DeviceArray<float>::zeros(64));
    require_ok(group.sum(MatrixView<float>(warm.data(), 1, 64), stream));
    require_ok(group.gather(MatrixView<float>(warm.data(), 2, 32), stream));
    Runner<std::remove_const_t<typename decltype(part)::element_type>> spread(part, device, stream);
    const auto want = run_alone(alone, prompt, given);
    const auto got = run_alone(spread, prompt, given);
    REQUIRE(want.size() == got.size());
    for (std::size_t i = 0; i < want.size(); ++i) {
      CAPTURE(i);
      CHECK(std::memcmp(got[i].data(), want[i].data(), want[i].size() * sizeof(float)) == 0);
    }
    require_ok(group.check());
  }
  CHECK(cuda::NcclGroup::create(nullptr).status().code() == StatusCode::kNullPointer);
  const Status failed = cuda::nccl_status(ncclInvalidArgument, "ncclSend", 3, comm);
  CHECK(failed.code() == StatusCode::kIoError);
  CHECK(failed.native_code() == static_cast<int>(ncclInvalidArgument));
  CHECK(failed.message().find("ncclSend, rank 3") != std::string::npos);
  cudaStreamDestroy(stream);
  CHECK(ncclCommDestroy(comm) == ncclSuccess);
}
#else
TEST_CASE("a model of one rank of NCCL has the plain one's bits, in a graph too") {
  TEST_SKIP("built without NCCL");
}
#endif

}  // namespace prefillshare::test
