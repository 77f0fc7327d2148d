// SPDX-License-Identifier: Apache-2.0
#include <prefillshare/kv/pages.hpp>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include <prefillshare/kv/allocator.hpp>
#include <support/catch.hpp>
#include <support/random.hpp>

using codegemm::StatusCode;
using prefillshare::Fp8E4M3;
using prefillshare::KvElement;
using prefillshare::KvLayout;
using prefillshare::KvPageFormat;
using prefillshare::KvShape;
using prefillshare::PageStorage;

namespace {

constexpr KvShape kShape{2, 3, 8, 4};

struct Pages {
  explicit Pages(const KvPageFormat& format, std::int64_t blocks = 5) {
    const auto bytes = static_cast<std::size_t>(
        blocks * KvShape{1, kShape.kv_heads, kShape.head_dim, kShape.block_tokens}.bytes_per_block(
                     prefillshare::bytes_of(format.element)));
    for (int layer = 0; layer < kShape.layers; ++layer) {
      memory.emplace_back(bytes, std::byte{0xA5});
      bases.push_back(memory.back().data());
    }
    auto created = PageStorage<>::create(kShape, blocks, format, bases);
    REQUIRE(created.ok());
    storage = std::make_unique<PageStorage<>>(*std::move(created));
  }
  std::vector<std::vector<std::byte>> memory;
  std::vector<void*> bases;
  std::unique_ptr<PageStorage<>> storage;
};

const KvElement kElements[] = {KvElement::kFp32, KvElement::kFp16, KvElement::kBf16, KvElement::kFp8E4M3};

}  // namespace

TEST_CASE("fp8 e4m3 rounds to the nearest number there is, and saturates") {
  CHECK(Fp8E4M3{0x08}.to_float() == 0x1p-6F);
  CHECK(Fp8E4M3{0x01}.to_float() == 0x1p-9F);
  CHECK(Fp8E4M3{0x7E}.to_float() == 448.0F);
  CHECK(Fp8E4M3{0xB8}.to_float() == -1.0F);
  CHECK(std::isnan(Fp8E4M3{0x7F}.to_float()));
  CHECK(Fp8E4M3::from_float(1e9F).bits == 0x7E);
  CHECK(Fp8E4M3::from_float(-std::numeric_limits<float>::infinity()).bits == 0xFE);
  CHECK(std::isnan(Fp8E4M3::from_float(std::numeric_limits<float>::quiet_NaN()).to_float()));
  for (int bits = 0; bits < 256; ++bits) {  // what is there stays
    const Fp8E4M3 number{static_cast<std::uint8_t>(bits)};
    if ((bits & 0x7F) != 0x7F) REQUIRE(Fp8E4M3::from_float(number.to_float()) == number);
  }
  codegemm::test::Rng rng(codegemm::test::seed_or(3));
  for (int i = 0; i < 20000; ++i) {
    const float value = rng.uniform(-1.0F, 1.0F) * std::exp2(rng.uniform(-12.0F, 8.5F));
    int nearest = 0;
    double least = 1e9;
    for (int bits = 0; bits < 256; ++bits) {
      if ((bits & 0x7F) == 0x7F) continue;
      const double distance =
          std::abs(double{Fp8E4M3{static_cast<std::uint8_t>(bits)}.to_float()} - double{value});
      if (distance < least || (distance == least && (bits & 1) == 0)) {
        least = distance;
        nearest = bits;
      }
    }
    CAPTURE(value, nearest);
    REQUIRE(Fp8E4M3::from_float(value).to_float() == Fp8E4M3{static_cast<std::uint8_t>(nearest)}.to_float());
  }
}

TEST_CASE("pages of every element type and layout give back what was written, within their rounding") {
  codegemm::test::Rng rng(codegemm::test::seed_or(5));
  for (const KvElement element : kElements) {
    for (const KvLayout layout : {KvLayout::kNhd, KvLayout::kHnd}) {
      CAPTURE(prefillshare::to_string(element), static_cast<int>(layout));
      Pages pages({element, layout});
      REQUIRE(pages.storage->set_scales(1, 0.5F, 2.0F).ok());
      const double unit = element == KvElement::kFp32   ? 0.0
                          : element == KvElement::kFp16 ? 0x1p-11
                          : element == KvElement::kBf16 ? 0x1p-8
                                                        : 0x1p-4;
      std::vector<std::vector<float>> written;
      for (int pass = 0; pass < 2; ++pass) {  // write all, then read all: no two places are one
        std::size_t next = 0;
        for (int layer = 0; layer < kShape.layers; ++layer) {
          for (prefillshare::BlockId block = 0; block < 5; ++block) {
            for (int part = 0; part < 2; ++part) {
              for (int slot = 0; slot < kShape.block_tokens; ++slot, ++next) {
                if (pass == 0) {
                  written.push_back(rng.normals(24));
                  prefillshare::store_token(pages.storage->pages(layer), block, slot, part, written.back());
                  continue;
                }
                std::vector<float> read(24);
                prefillshare::load_token(pages.storage->pages(layer), block, slot, part, read);
                for (std::size_t i = 0; i < 24; ++i) {
                  const double want = written[next][i];
                  REQUIRE(std::abs(read[i] - want) <= unit * std::abs(want) + (unit > 0 ? 0x1p-9 : 0.0));
                }
              }
            }
          }
        }
      }
    }
  }
}

TEST_CASE("a dense page has FlashInfer's strides") {
  CHECK(prefillshare::dense_strides(kShape, KvLayout::kNhd) == prefillshare::KvStrides{192, 96, 24, 8});
  CHECK(prefillshare::dense_strides(kShape, KvLayout::kHnd) == prefillshare::KvStrides{192, 96, 8, 32});
}

TEST_CASE("copying the start of a block copies those tokens and no others") {
  for (const KvElement element : kElements) {
    for (const KvLayout layout : {KvLayout::kNhd, KvLayout::kHnd}) {
      Pages pages({element, layout});
      const auto value = [](int block, int slot) {  // each another, and exact in every type
        return Fp8E4M3{static_cast<std::uint8_t>(0x20 + 4 * block + slot)}.to_float();
      };
      for (int layer = 0; layer < 2; ++layer) {
        for (int block = 0; block < 5; ++block) {
          for (int slot = 0; slot < 4; ++slot) {
            for (int part = 0; part < 2; ++part) {
              prefillshare::store_token(pages.storage->pages(layer), block, slot, part,
                                        std::vector<float>(24, value(block, slot)));
            }
          }
        }
      }
      REQUIRE(pages.storage->copy_block(3, 1, 2).ok());
      std::vector<std::byte> whole(static_cast<std::size_t>(pages.storage->bytes_per_block()));
      REQUIRE(pages.storage->read_block(0, whole).ok());
      REQUIRE(pages.storage->write_block(4, whole).ok());
      for (int layer = 0; layer < 2; ++layer) {
        for (int block = 0; block < 5; ++block) {
          for (int slot = 0; slot < 4; ++slot) {
            std::vector<float> read(24);
            prefillshare::load_token(pages.storage->pages(layer), block, slot, slot % 2, read);
            const int from = block == 3 && slot < 2 ? 1 : block == 4 ? 0 : block;
            REQUIRE(read == std::vector<float>(24, value(from, slot)));
          }
        }
      }
      CHECK(pages.storage->copy_block(5, 0, 1).code() == StatusCode::kInvalidArgument);
      CHECK(pages.storage->read_block(0, std::span(whole).first(1)).code() == StatusCode::kInvalidArgument);
    }
  }
}

TEST_CASE("the allocator runs over a caller's pages") {
  Pages pages({KvElement::kFp8E4M3, KvLayout::kHnd});
  auto allocator = prefillshare::BasicKvAllocator<PageStorage<>>::create(*pages.storage);
  REQUIRE(allocator.ok());
  auto base = (*allocator)->open({"m", "1", ""}, {});
  REQUIRE((*allocator)->reserve(*base, 6).ok());
  prefillshare::store_token(pages.storage->pages(1), base->blocks()[1], 1, 0, std::vector<float>(24, 3.5F));
  REQUIRE((*allocator)->commit(*base, std::vector<std::int32_t>{1, 2, 3, 4, 5, 6}).ok());
  auto fork = (*allocator)->fork(*base);
  REQUIRE((*allocator)->append_private(*fork, 1).ok());
  REQUIRE(fork->blocks()[1] != base->blocks()[1]);
  std::vector<float> read(24);
  prefillshare::load_token(pages.storage->pages(1), fork->blocks()[1], 1, 0, read);
  CHECK(read == std::vector<float>(24, 3.5F));
  CHECK((*allocator)->stats().bytes_per_block == kShape.bytes_per_block(1));
}

TEST_CASE("PageStorage refuses what cannot be") {
  Pages pages({});
  const KvPageFormat format;
  const std::vector<void*> one = {pages.bases[0]};
  CHECK(PageStorage<>::create(kShape, 5, format, one).status().code() == StatusCode::kInvalidArgument);
  const std::vector<void*> null = {pages.bases[0], nullptr};
  CHECK(PageStorage<>::create(kShape, 5, format, null).status().code() == StatusCode::kNullPointer);
  CHECK(PageStorage<>::create(kShape, -1, format, pages.bases).status().code() ==
        StatusCode::kInvalidArgument);
  CHECK(PageStorage<>::create(kShape, 5, format, {192, 96, 24, 4}, pages.bases).status().code() ==
        StatusCode::kInvalidArgument);
  CHECK(pages.storage->set_scales(0, 0.0F, 1.0F).code() == StatusCode::kInvalidArgument);
  CHECK(pages.storage->set_scales(2, 1.0F, 1.0F).code() == StatusCode::kInvalidArgument);
}
