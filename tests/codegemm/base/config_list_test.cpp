// SPDX-License-Identifier: Apache-2.0
#include <codegemm/base/config_list.hpp>

#include <vector>

#include <support/catch.hpp>

namespace {

template <int V>
struct Row {
  static constexpr int kVecLen = V;
};
using Rows = codegemm::config_list<Row<2>, Row<4>, Row<8>>;

int chosen(int at_least) {
  int vec_len = 0;
  const bool found = codegemm::first_match(
      Rows{}, [&](auto row) { return row.kVecLen >= at_least; }, [&](auto row) { vec_len = row.kVecLen; });
  return found ? vec_len : -1;
}

}  // namespace

TEST_CASE("config list: the first that fits, or none") {
  static_assert(Rows::kSize == 3);
  CHECK(chosen(1) == 2);
  CHECK(chosen(3) == 4);
  CHECK(chosen(8) == 8);
  CHECK(chosen(9) == -1);
}

TEST_CASE("config list: all of them, in order") {
  std::vector<int> seen;
  codegemm::for_each_config(Rows{}, [&](auto row) { seen.push_back(row.kVecLen); });
  CHECK(seen == std::vector<int>{2, 4, 8});
  codegemm::for_each_config(codegemm::config_list<>{}, [&](auto) { seen.clear(); });
  CHECK(seen.size() == 3);
}
