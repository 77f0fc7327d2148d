// SPDX-License-Identifier: Apache-2.0
//
// tests/prefillshare/attention/validate_gpu_test.cu - every wrong call of the attention on the GPU has its
// own answer, before anything is launched. Needs no GPU: what a device can do is a struct, and no call here
// may reach one.
#include <cmath>

#include <prefillshare/attention/append.cuh>
#include <prefillshare/attention/decode.cuh>
#include <prefillshare/attention/prefill.cuh>
#include <support/catch.hpp>

namespace prefillshare::test {
namespace {

using codegemm::BFloat16;
using codegemm::Half;
using codegemm::MatrixView;
using codegemm::Status;
using codegemm::StatusCode;

constexpr codegemm::cuda::Device kHopper{90, 132, 232448, {0, 132, 66, 40, 30, 22, 16, 16, 14}};
constexpr codegemm::cuda::Device kTuring{75, 68, 65536, {}};
constexpr codegemm::cuda::Device kAmpere{80, 108, 166912, {}};

// Never followed: every call below must stop at the checks.
template <class T>
T* address(std::uintptr_t value) {
  return reinterpret_cast<T*>(value);
}

using Append = cuda::AppendProblem<Half>;
using Prefill = cuda::PrefillProblem<BFloat16, float>;
using Decode = cuda::DecodeProblem<Half>;

cuda::PageTableView good_table() {
  return {address<const std::int32_t>(4096), address<const std::int32_t>(8192),
          address<const std::int32_t>(12288), 3};
}
Append good_append() {
  Append p;
  p.kv = cuda::kv_pages(address<Half>(65536), cuda::KvLayout::kNhd, 100, 16, 2, 128);
  p.table = good_table();
  p.q = MatrixView<Half>(address<Half>(32768), 3, 1024);
  p.k = MatrixView<const Half>(address<const Half>(40960), 3, 256);
  p.v = MatrixView<const Half>(address<const Half>(49152), 3, 256);
  p.heads = 8;
  return p;
}
Prefill good_prefill() {
  Prefill p;
  p.kv = cuda::kv_pages(address<const BFloat16>(65536), cuda::KvLayout::kHnd, 100, 16, 2, 128);
  p.table = good_table();
  p.query_indptr = address<const std::int32_t>(16384);
  p.q = MatrixView<const BFloat16>(address<const BFloat16>(32768), 10, 1024);
  p.out = MatrixView<float>(address<float>(131072), 10, 1024);
  p.heads = 8;
  return p;
}
Decode good_decode() {
  Decode p;
  p.kv = cuda::kv_pages(address<const Half>(65536), cuda::KvLayout::kNhd, 100, 16, 2, 128);
  p.table = good_table();
  p.q = MatrixView<const Half>(address<const Half>(32768), 3, 1024);
  p.out = MatrixView<Half>(address<Half>(40960), 3, 1024);
  p.heads = 8;
  return p;
}

Status call(const Append& p, const codegemm::cuda::Device& device) { return cuda::run(p, device, nullptr); }
Status call(const Prefill& p, const codegemm::cuda::Device& device) { return cuda::run(p, device, nullptr); }
Status call(const Decode& p, const codegemm::cuda::Device& device) {
  const Status prepared = cuda::prepare(p, device, nullptr, 0, nullptr);
  const Status status = cuda::run(p, device, nullptr, 0, nullptr);
  CHECK(prepared.code() == status.code());
  return status;
}

template <class Problem>
void expect(const Problem& p, StatusCode code, const char* text,
            const codegemm::cuda::Device& device = kHopper) {
  const Status status = cuda::validate(p, device);
  CAPTURE(status.message(), text);
  CHECK(status.code() == code);
  CHECK(status.message().find(text) != std::string::npos);
  CHECK(call(p, device).code() == code);
}

// Faults that all three calls know.
template <class Problem>
void check_common(Problem (*good)()) {
  CHECK(cuda::validate(good(), kHopper).ok());
  Problem p = good();
  expect(p, StatusCode::kUnsupported, "compute capability 7.5", kTuring);
  p.kv.head_dim = 120;
  expect(p, StatusCode::kUnsupported, "head_dim = 120");
  for (const int size : {0, 65}) {
    p = good();
    p.kv.page_size = size;
    expect(p, StatusCode::kUnsupported, "pages of");
  }
  p = good();
  p.kv.kv_heads = 0;
  expect(p, StatusCode::kInvalidArgument, "0 K/V heads");
  p = good();
  p.kv.pages = -1;
  expect(p, StatusCode::kInvalidArgument, "-1 pages");
  p = good();
  p.kv.page_stride += 4;
  expect(p, StatusCode::kMisaligned, "page_stride");
  p = good();
  p.kv.token_stride = 0;
  expect(p, StatusCode::kMisaligned, "token_stride = 0");
  p = good();
  p.kv.head_stride = 64;
  expect(p, StatusCode::kInvalidArgument, "head_stride 64");
  for (const std::int64_t stride : {std::int64_t{8}, good().kv.page_stride / 2 - 8}) {
    p = good();
    p.kv.page_stride = stride;
    expect(p, StatusCode::kInvalidArgument, "overlap");
  }
  p = good();
  p.kv.token_stride = p.kv.head_stride = 128;
  expect(p, StatusCode::kInvalidArgument, "overlap");
  p = good();
  p.kv.page_stride = std::int64_t{1} << 60;
  expect(p, StatusCode::kUnsupported, "a stride of 1152921504606846976 over 100");
  p = good();  // slots apart, pages beside each other
  p.kv.head_stride = 128;
  p.kv.page_stride = 256;
  p.kv.token_stride = 256 * 100;
  CHECK(cuda::validate(p, kHopper).ok());
  p = good();
  p.kv.v = nullptr;
  expect(p, StatusCode::kNullPointer, "v is null");
  p = good();
  p.kv.k += 4;
  expect(p, StatusCode::kMisaligned, "k is not aligned");
  p = good();
  p.table.sequences = -1;
  expect(p, StatusCode::kInvalidArgument, "-1 sequences");
  p = good();
  p.table.indptr = nullptr;
  expect(p, StatusCode::kNullPointer, "indptr is null");
  p = good();
  p.table.indices = nullptr;
  expect(p, StatusCode::kNullPointer, "indices is null");
  p = good();
  p.table.last_page_len = nullptr;
  expect(p, StatusCode::kNullPointer, "last_page_len is null");
  p = good();
  p.q.cols = 1016;
  expect(p, StatusCode::kShapeMismatch, "q is");
  p = good();
  p.q.stride = 1023;
  expect(p, StatusCode::kInvalidArgument, "stride 1023");
  p = good();
  p.q.stride = 1028;
  expect(p, StatusCode::kMisaligned, "stride 1028");
  p = good();
  p.q.data += 2;
  expect(p, StatusCode::kMisaligned, "q is not aligned");
}

// Faults of the two that write an output.
template <class Problem>
void check_attention(Problem (*good)()) {
  Problem p = good();
  p.out.rows -= 1;
  expect(p, StatusCode::kShapeMismatch, "out is");
  p = good();
  p.out.data = nullptr;
  expect(p, StatusCode::kNullPointer, "out is null");
  p = good();
  p.q.data = nullptr;
  expect(p, StatusCode::kNullPointer, "q is null");
  p = good();
  p.out.data = address<std::remove_pointer_t<decltype(p.out.data)>>(32768 + 1024);  // within q
  expect(p, StatusCode::kInvalidArgument, "out overlaps q");
  p.out.data = address<std::remove_pointer_t<decltype(p.out.data)>>(32768 + 2048);
  p.out.stride = p.q.stride = 4096;  // columns beside each other
  CHECK(cuda::validate(p, kHopper).ok());
  p = good();
  p.heads = 7;
  expect(p, StatusCode::kInvalidArgument, "7 heads over 2");
  for (const float scale : {-1.0F, INFINITY, NAN}) {
    p = good();
    p.scale = scale;
    expect(p, StatusCode::kInvalidArgument, "scale");
  }
  p = good();
  p.kv.head_dim = 256;
  expect(p, StatusCode::kUnsupported, "64, 96 or 128");
}

TEST_CASE("cuda append: every wrong operand has its own status") {
  check_common(good_append);
  Append p = good_append();
  p.k.rows = p.v.rows = p.q.rows = 2;
  expect(p, StatusCode::kShapeMismatch, "2 tokens for 3 sequences");
  p = good_append();
  p.v.rows = 2;
  expect(p, StatusCode::kShapeMismatch, "v is 2 x 256");
  p = good_append();
  p.k.data = nullptr;
  expect(p, StatusCode::kNullPointer, "k is null");
  p = good_append();
  p.heads = 0;
  expect(p, StatusCode::kInvalidArgument, "0 heads");
  p = good_append();
  p.rope.cos = address<const float>(256);
  expect(p, StatusCode::kNullPointer, "sin is null");
  p.rope.sin = address<const float>(256);
  expect(p, StatusCode::kInvalidArgument, "0 positions");
  p = good_append();
  p.table.sequences = 0;
  p.query_indptr = address<const std::int32_t>(4096);
  expect(p, StatusCode::kShapeMismatch, "no sequence");
  p = good_append();
  p.k.rows = -1;
  expect(p, StatusCode::kInvalidArgument, "-1 tokens");
  p = Append();
  p.kv = good_append().kv;
  p.kv.k = p.kv.v = nullptr;
  p.k = p.v = MatrixView<const Half>(nullptr, 0, 256);
  CHECK(cuda::run(p, kHopper, nullptr).ok());  // no tokens
}

TEST_CASE("cuda prefill: every wrong operand has its own status") {
  check_common(good_prefill);
  check_attention(good_prefill);
  Prefill p = good_prefill();
  p.query_indptr = nullptr;
  expect(p, StatusCode::kNullPointer, "query_indptr is null");
  p = good_prefill();
  p.table.sequences = 0;
  expect(p, StatusCode::kShapeMismatch, "no sequence");
  p = good_prefill();
  p.tuning.kernel = cuda::PrefillKernel::kWgmma;
  expect(p, StatusCode::kUnsupported, "wgmma on compute capability 8.0, expected 9.0", kAmpere);
  cuda::Device plain = kHopper;
  plain.wgmma = false;  // a program built for sm_90
  expect(p, StatusCode::kUnsupported, "build for sm_90a", plain);
  p = good_prefill();
  p.q.rows = p.out.rows = (1 << 20) + 1;
  expect(p, StatusCode::kInvalidArgument, "1048577 tokens");
  p.q.rows = p.out.rows = 0;
  p.q.data = nullptr;
  p.out.data = nullptr;
  CHECK(cuda::run(p, kHopper, nullptr).ok());  // no tokens
}

TEST_CASE("cuda decode: every wrong operand has its own status") {
  check_common(good_decode);
  check_attention(good_decode);
  Decode p = good_decode();
  p.prefixes.groups = 1;
  expect(p, StatusCode::kNullPointer, "group_indptr is null");
  p.prefixes.group_indptr = address<const std::int32_t>(4096);
  expect(p, StatusCode::kNullPointer, "shared_pages is null");
  p.prefixes.groups = -1;
  expect(p, StatusCode::kInvalidArgument, "-1 groups");
  p = good_decode();
  p.tuning.min_tiles = 0;
  expect(p, StatusCode::kInvalidArgument, "0 tiles a block");
  p = good_decode();
  p.tuning.many_rows_cost = 99;
  expect(p, StatusCode::kInvalidArgument, "99 percent");
  p = good_decode();
  p.tuning.tail_item_cost = -1;
  expect(p, StatusCode::kInvalidArgument, "tails at -1");
  p = good_decode();
  p.tuning.min_shared_sequences = 0;
  expect(p, StatusCode::kInvalidArgument, "from 0 sequences");
  p = good_decode();
  p.tuning.lanes = 3;
  expect(p, StatusCode::kInvalidArgument, "3 lanes for 2");
}

// By validate() alone: run() would compile the kernels once more.
TEST_CASE("cuda attention: a cache of fp8 has strides of 16 elements and positive scales") {
  cuda::DecodeProblem<Half, Half, Fp8E4M3> good;
  good.kv = cuda::kv_pages(address<const Fp8E4M3>(65536), cuda::KvLayout::kNhd, 100, 16, 2, 128);
  good.kv.k_scale = 0.5F;
  good.table = good_decode().table;
  good.q = good_decode().q;
  good.out = good_decode().out;
  good.heads = good_decode().heads;
  CHECK(cuda::validate(good, kHopper).ok());
  const auto refused = [](const auto& p, StatusCode code, const char* text) {
    const Status status = cuda::validate(p, kHopper);
    CAPTURE(status.message(), text);
    CHECK(status.code() == code);
    CHECK(status.message().find(text) != std::string::npos);
  };
  auto p = good;
  p.kv.page_stride += 8;
  refused(p, StatusCode::kMisaligned, "positive multiple of 16 elements");
  for (const float scale : {0.0F, -1.0F, INFINITY, NAN}) {
    p = good;
    p.kv.k_scale = scale;
    refused(p, StatusCode::kInvalidArgument, "scales");
    p = good;
    p.kv.v_scale = scale;
    refused(p, StatusCode::kInvalidArgument, "of V, expected positive numbers");
  }
  cuda::PrefillProblem<BFloat16, float, Fp8E4M3> prefill;
  prefill.kv = good.kv;
  prefill.table = good.table;
  prefill.query_indptr = good_prefill().query_indptr;
  prefill.q = good_prefill().q;
  prefill.out = good_prefill().out;
  prefill.heads = 8;
  CHECK(cuda::validate(prefill, kHopper).ok());
  prefill.tuning.kernel = cuda::PrefillKernel::kWgmma;
  refused(prefill, StatusCode::kUnsupported, "wgmma over a cache of fp8");
}

TEST_CASE("cuda decode: the workspace is checked, and grows with sharing alone") {
  const Decode p = good_decode();
  const std::size_t size = cuda::workspace_bytes(p, kHopper);
  REQUIRE(size > 0);
  const auto code = [&](void* workspace, std::size_t bytes) {
    const StatusCode prepared = cuda::prepare(p, kHopper, workspace, bytes, nullptr).code();
    CHECK(cuda::run(p, kHopper, workspace, bytes, nullptr).code() == prepared);
    return prepared;
  };
  CHECK(code(address<void>(4096), size - 1) == StatusCode::kWorkspaceTooSmall);
  CHECK(code(nullptr, size) == StatusCode::kNullPointer);
  CHECK(code(address<void>(4096 + 128), size) == StatusCode::kMisaligned);
  Decode shared = p;
  shared.prefixes = {address<const std::int32_t>(4096), address<const std::int32_t>(4096), 1};
  CHECK(cuda::workspace_bytes(shared, kHopper) > size);
  shared.tuning.shared = cuda::SharedPath::kNever;
  CHECK(cuda::workspace_bytes(shared, kHopper) == size);
  Decode none = p;
  none.table.sequences = 0;
  none.q.rows = none.out.rows = 0;
  CHECK(cuda::workspace_bytes(none, kHopper) == 0);
  CHECK(call(none, kHopper).ok());
}

}  // namespace
}  // namespace prefillshare::test
