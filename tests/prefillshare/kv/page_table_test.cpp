// SPDX-License-Identifier: Apache-2.0
#include <prefillshare/kv/page_table.hpp>

#include <cstdint>
#include <numeric>
#include <vector>

#include <prefillshare/kv/allocator.hpp>

#include <support/catch.hpp>

using codegemm::StatusCode;
using prefillshare::BasicKvAllocator;
using prefillshare::NoKvStorage;
using prefillshare::PageTable;
using prefillshare::Sequence;
using Allocator = BasicKvAllocator<NoKvStorage>;
using Ints = std::vector<std::int32_t>;

namespace {

Sequence filled(Allocator& allocator, std::int32_t first_token, std::int64_t length) {
  Ints tokens(static_cast<std::size_t>(length));
  std::iota(tokens.begin(), tokens.end(), first_token);
  auto sequence = allocator.open({"m", "1", ""}, {});
  REQUIRE(sequence.ok());
  REQUIRE(allocator.reserve(*sequence, length).ok());
  REQUIRE(allocator.commit(*sequence, tokens).ok());
  return *std::move(sequence);
}

}  // namespace

TEST_CASE("page table in CSR form") {
  NoKvStorage storage({1, 1, 8, 4}, 16);
  auto allocator = Allocator::create(storage);
  REQUIRE(allocator.ok());
  const Sequence five = filled(**allocator, 100, 5);   // blocks 0, 1
  const Sequence eight = filled(**allocator, 200, 8);  // blocks 2, 3
  const Sequence none = filled(**allocator, 300, 0);
  Sequence one = filled(**allocator, 400, 1);   // block 4
  REQUIRE((*allocator)->reserve(one, 9).ok());  // and 5, 6, which hold nothing yet

  PageTable table;
  const std::vector<const Sequence*> batch = {&five, &none, &eight, &one, &five};
  REQUIRE(prefillshare::export_page_table(batch, table).ok());
  CHECK(table.indptr == Ints{0, 2, 2, 4, 5, 7});
  CHECK(table.indices == Ints{0, 1, 2, 3, 4, 0, 1});
  CHECK(table.last_page_len == Ints{1, 4, 4, 1, 1});
  for (std::size_t i = 0; i < batch.size(); ++i) {
    CHECK(4 * (table.indptr[i + 1] - table.indptr[i] - 1) + table.last_page_len[i] == batch[i]->length());
  }

  REQUIRE(prefillshare::export_page_table({}, table).ok());
  CHECK(table.indptr == Ints{0});
  CHECK(table.indices.empty());
  CHECK(table.last_page_len.empty());
}

TEST_CASE("page table with the tokens that a pass is going to write") {
  NoKvStorage storage({1, 1, 8, 4}, 16);
  auto allocator = Allocator::create(storage);
  REQUIRE(allocator.ok());
  const Sequence five = filled(**allocator, 100, 5);  // blocks 0, 1
  Sequence one = filled(**allocator, 400, 1);         // block 2
  REQUIRE((*allocator)->reserve(one, 6).ok());        // and 3
  PageTable table;
  const std::vector<const Sequence*> batch = {&five, &one};
  REQUIRE(prefillshare::export_page_table(batch, table, std::vector<std::int64_t>{3, 4}).ok());
  CHECK(table.indptr == Ints{0, 2, 4});
  CHECK(table.indices == Ints{0, 1, 2, 3});
  CHECK(table.last_page_len == Ints{4, 1});

  const PageTable before = table;
  for (const std::vector<std::int64_t>& pending :
       {std::vector<std::int64_t>{4, 0}, {0, 8}, {-1, 0}, {0, std::int64_t{1} << 62}}) {
    CHECK(prefillshare::export_page_table(batch, table, pending).code() == StatusCode::kInvalidArgument);
  }
  CHECK(prefillshare::export_page_table(batch, table, std::vector<std::int64_t>{1}).code() ==
        StatusCode::kShapeMismatch);
  CHECK(table.indices == before.indices);
}

TEST_CASE("page table refuses what is not one batch") {
  NoKvStorage storage({1, 1, 8, 4}, 4);
  auto first = Allocator::create(storage);
  auto second = Allocator::create(storage);
  REQUIRE(first.ok());
  REQUIRE(second.ok());
  const Sequence mine = filled(**first, 0, 4);
  const Sequence other = filled(**second, 0, 4);
  const Sequence closed;
  PageTable table;
  table.indptr = {42};
  using Batch = std::vector<const Sequence*>;
  CHECK(prefillshare::export_page_table(Batch{&mine, nullptr}, table).code() == StatusCode::kNullPointer);
  CHECK(prefillshare::export_page_table(Batch{&mine, &closed}, table).code() == StatusCode::kInvalidArgument);
  CHECK(prefillshare::export_page_table(Batch{&mine, &other}, table).code() == StatusCode::kIncompatible);
  CHECK(table.indptr == Ints{42});
}
