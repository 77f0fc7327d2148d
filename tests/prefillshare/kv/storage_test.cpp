// SPDX-License-Identifier: Apache-2.0
#include <prefillshare/kv/storage.hpp>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <support/catch.hpp>

using codegemm::StatusCode;
using prefillshare::HostKvStorage;
using prefillshare::KvLayerView;
using prefillshare::KvShape;

TEST_CASE("KvShape counts bytes") {
  const KvShape llama_8b{32, 8, 128, 16};
  CHECK(llama_8b.bytes_per_token(2) == 131072);
  CHECK(llama_8b.bytes_per_block(2) == 2097152);
  const KvShape smollm{30, 3, 64, 16};
  CHECK(smollm.bytes_per_token() == 46080);
  CHECK(smollm.bytes_per_block() == 737280);
}

TEST_CASE("KvShape names the field that is wrong") {
  CHECK(prefillshare::validate(KvShape{1, 1, 1, 1}).ok());
  const auto message = [](KvShape shape) {
    const codegemm::Status status = prefillshare::validate(shape);
    REQUIRE(status.code() == StatusCode::kInvalidArgument);
    return status.message();
  };
  CHECK(message({0, 1, 8, 16}) == "KvShape: layers = 0, expected 1 to 65536");
  CHECK(message({1, -3, 8, 16}) == "KvShape: kv_heads = -3, expected 1 to 16384");
  CHECK(message({1, 1, 20000, 16}) == "KvShape: head_dim = 20000, expected 1 to 16384");
  CHECK(message({1, 1, 8, 0}) == "KvShape: block_tokens = 0, expected 1 to 4096");
}

TEST_CASE("HostKvStorage lays pages out as [layer][block][K, V][slot][head][dim]") {
  const KvShape shape{2, 3, 4, 5};
  auto storage = HostKvStorage::create(shape, 6);
  REQUIRE(storage.ok());
  CHECK(storage->shape() == shape);
  CHECK(storage->blocks() == 6);
  CHECK(storage->bytes_per_block() == 960);  // 2 layers, K and V, 3 heads, 4 numbers, 5 slots, 4 bytes
  const float* base = storage->layer(0).data;
  CHECK(reinterpret_cast<std::uintptr_t>(base) % 64 == 0);
  std::ptrdiff_t expected = 0;
  for (int layer = 0; layer < 2; ++layer) {
    for (int block = 0; block < 6; ++block) {
      for (int part = 0; part < 2; ++part) {
        for (int slot = 0; slot < 5; ++slot) {
          const float* at = part == 0 ? storage->k(layer, block, slot) : storage->v(layer, block, slot);
          REQUIRE(at - base == expected);
          expected += 12;
        }
      }
    }
  }
  const KvLayerView<const float> view = storage->layer(1);
  CHECK(view.v(2, 3) == storage->v(1, 2, 3));
  CHECK(view.slot_stride() == 12);
}

TEST_CASE("HostKvStorage copies the first slots of a block, K and V of every layer") {
  const KvShape shape{3, 2, 4, 5};
  auto storage = HostKvStorage::create(shape, 3);
  REQUIRE(storage.ok());
  const auto value = [](int layer, int block, int part, int slot, int i) {
    return static_cast<float>((((layer * 3 + block) * 2 + part) * 5 + slot) * 8 + i);
  };
  const auto check_all = [&](int copied) {
    for (int layer = 0; layer < 3; ++layer) {
      for (int block = 0; block < 3; ++block) {
        for (int slot = 0; slot < 5; ++slot) {
          const int from = block == 0 && slot < copied ? 2 : block;
          for (int i = 0; i < 8; ++i) {
            REQUIRE(storage->k(layer, block, slot)[i] == value(layer, from, 0, slot, i));
            REQUIRE(storage->v(layer, block, slot)[i] == value(layer, from, 1, slot, i));
          }
        }
      }
    }
  };
  for (int layer = 0; layer < 3; ++layer) {
    for (int block = 0; block < 3; ++block) {
      for (int slot = 0; slot < 5; ++slot) {
        for (int i = 0; i < 8; ++i) {
          storage->k(layer, block, slot)[i] = value(layer, block, 0, slot, i);
          storage->v(layer, block, slot)[i] = value(layer, block, 1, slot, i);
        }
      }
    }
  }
  REQUIRE(storage->copy_block(0, 2, 0).ok());
  check_all(0);
  REQUIRE(storage->copy_block(1, 1, 5).ok());
  check_all(0);
  REQUIRE(storage->copy_block(0, 2, 3).ok());
  check_all(3);
  REQUIRE(storage->copy_block(0, 2, 5).ok());
  check_all(5);
  CHECK(storage->copy_block(3, 0, 1).code() == StatusCode::kInvalidArgument);
  CHECK(storage->copy_block(0, -1, 1).code() == StatusCode::kInvalidArgument);
  CHECK(storage->copy_block(0, 1, 6).message() ==
        "HostKvStorage: copy of 6 tokens from block 1 to block 0; there are 3 blocks of 5 tokens");
  CHECK(storage->copy_block(0, 1, -1).code() == StatusCode::kInvalidArgument);
  check_all(5);
}

TEST_CASE("HostKvStorage refuses impossible sizes") {
  CHECK(HostKvStorage::create({0, 1, 8, 16}, 4).status().code() == StatusCode::kInvalidArgument);
  CHECK(HostKvStorage::create({1, 1, 8, 16}, -1).status().code() == StatusCode::kInvalidArgument);
  CHECK(HostKvStorage::create({1, 1, 8, 16}, std::int64_t{1} << 40).status().code() ==
        StatusCode::kInvalidArgument);
  CHECK(HostKvStorage::create({65536, 16384, 16384, 4096}, 1 << 30).status().code() ==
        StatusCode::kInvalidArgument);
  CHECK(HostKvStorage::create({1, 1, 8, 16}, 0).ok());
}
