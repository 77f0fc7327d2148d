// SPDX-License-Identifier: Apache-2.0
//
// Admission: what was submitted leaves once, what has begun always has its blocks, tenants share by weight.
#include <prefillshare/serve/admission.hpp>

#include <algorithm>
#include <cstdint>
#include <map>
#include <set>
#include <vector>

#include <support/catch.hpp>
#include <support/random.hpp>

namespace {

using namespace prefillshare;  // NOLINT(google-build-using-namespace): a test
using codegemm::test::Rng;
using codegemm::test::seed_or;
using Kind = Admission::Kind;

}  // namespace

TEST_CASE("random operations: everything leaves the queue once, and what begins has room") {
  const std::uint64_t seed = seed_or(21);
  CAPTURE(seed);
  Rng rng(seed);
  AdmissionLimits limits{100, 12, 20};
  AdmissionQueue<ArrivalOrder> queue(limits);
  struct Waiting {
    AdmissionRequest request;
  };
  std::vector<Waiting> waiting;  // in the order of arrival
  std::map<std::uint64_t, std::int64_t> begun;
  std::set<std::uint64_t> left;
  std::uint64_t next = 1;
  double now = 0.0;
  int expired = 0;
  int refused = 0;
  int held_back = 0;
  const auto held = [&] {
    std::int64_t sum = 0;
    for (const auto& [id, blocks] : begun) sum += blocks;
    return sum;
  };
  for (int step = 0; step < 30'000; ++step) {
    now += 0.25 * static_cast<double>(rng.below(3));
    const std::int64_t action = rng.below(10);
    if (action < 4) {
      AdmissionRequest request{next++, 0, rng.below(60), kNoDeadline};
      if (rng.below(3) == 0) request.deadline = now + 0.25 * static_cast<double>(1 + rng.below(40));
      const Status status = queue.submit(request, now);
      if (request.blocks > limits.blocks) {
        REQUIRE(status.code() == StatusCode::kInvalidArgument);
      } else if (std::ssize(waiting) >= limits.queued) {
        REQUIRE(status.code() == StatusCode::kExhausted);
      } else {
        REQUIRE(status.ok());
        waiting.push_back({request});
        REQUIRE(queue.submit(request, now).code() == StatusCode::kInvalidArgument);
      }
    } else if (action < 7) {
      const std::int64_t mood = rng.below(8);  // the decode side: 0 full, 1 broken
      const Admission out = queue.next(now, [&](const AdmissionRequest&) {
        if (mood == 0) return error(StatusCode::kExhausted, "full");
        if (mood == 1) return error(StatusCode::kIncompatible, "broken");
        return Status();
      });
      const auto over =
          std::min_element(waiting.begin(), waiting.end(), [](const Waiting& a, const Waiting& b) {
            return std::pair(a.request.deadline, a.request.id) < std::pair(b.request.deadline, b.request.id);
          });
      if (over != waiting.end() && over->request.deadline <= now) {
        REQUIRE(out.kind == Kind::kExpired);
        REQUIRE(out.request.id == over->request.id);
        REQUIRE(out.status.code() == StatusCode::kCancelled);
        REQUIRE(left.insert(out.request.id).second);
        waiting.erase(over);
        ++expired;
      } else if (waiting.empty() || std::ssize(begun) >= limits.begun ||
                 waiting.front().request.blocks > limits.blocks - held() || mood == 0) {
        REQUIRE(out.kind == Kind::kNone);
        held_back += waiting.empty() ? 0 : 1;
      } else {
        REQUIRE(out.kind == (mood == 1 ? Kind::kRefused : Kind::kAdmitted));
        REQUIRE(out.request.id == waiting.front().request.id);
        REQUIRE(left.insert(out.request.id).second);
        if (mood != 1) begun[out.request.id] = out.request.blocks;
        refused += mood == 1 ? 1 : 0;
        waiting.erase(waiting.begin());
      }
    } else if (action < 9 && !begun.empty()) {
      auto one = begun.begin();
      std::advance(one, rng.below(std::ssize(begun)));
      REQUIRE(!queue.cancel(one->first));
      REQUIRE(queue.release(one->first));
      REQUIRE(!queue.release(one->first));
      begun.erase(one);
    } else if (rng.below(4) == 0 && !waiting.empty()) {
      const auto at = static_cast<std::size_t>(rng.below(std::ssize(waiting)));
      const std::uint64_t id = waiting[at].request.id;
      REQUIRE(!queue.release(id));
      REQUIRE(queue.cancel(id));
      REQUIRE(!queue.cancel(id));
      REQUIRE(left.insert(id).second);
      waiting.erase(waiting.begin() + static_cast<std::ptrdiff_t>(at));
    } else if (rng.below(50) == 0) {
      limits.blocks = 60 + rng.below(60);  // a worker comes or goes
      queue.set_limits(limits);
      // What no longer fits at all would wait for ever: the caller decides. Here it goes.
      for (std::size_t i = 0; i < waiting.size();) {
        if (waiting[i].request.blocks <= limits.blocks) {
          ++i;
          continue;
        }
        REQUIRE(queue.cancel(waiting[i].request.id));
        waiting.erase(waiting.begin() + static_cast<std::ptrdiff_t>(i));
      }
    }
    REQUIRE(queue.queued() == std::ssize(waiting));
    REQUIRE(queue.begun() == std::ssize(begun));
    REQUIRE(queue.held() == held());
    double least = kNoDeadline;
    for (const Waiting& one : waiting) least = std::min(least, one.request.deadline);
    REQUIRE(queue.next_deadline() == least);
  }
  CHECK(expired > 100);
  CHECK(refused > 100);
  CHECK(held_back > 100);
}

TEST_CASE("a large request is not starved by small ones behind it") {
  // [guide: admission]
  AdmissionQueue<> queue({10, 100, 100});  // blocks, sessions that have begun, sessions that wait
  for (std::uint64_t id = 1; id <= 5; ++id) REQUIRE(queue.submit({id, 0, 2}, 0.0).ok());
  for (std::uint64_t id = 1; id <= 5; ++id) REQUIRE(queue.next(0.0).request.id == id);
  REQUIRE(queue.submit({100, 0, 10}, 0.0).ok());
  REQUIRE(queue.submit({101, 0, 1}, 0.0).ok());
  for (std::uint64_t id = 1; id <= 4; ++id) {
    REQUIRE(queue.release(id));
    REQUIRE(queue.next(0.0).kind == Kind::kNone);  // 100 needs all ten blocks; 101 does not overtake it
  }
  // [guide: end]
  REQUIRE(queue.release(5));
  CHECK(queue.next(0.0).request.id == 100);
  CHECK(queue.next(0.0).kind == Kind::kNone);
}

TEST_CASE("tenants share by weight, and a flood waits behind itself") {
  FairOrder order;
  REQUIRE(order.set_weight(2, 3.0).ok());
  CHECK(order.set_weight(2, 0.0).code() == StatusCode::kInvalidArgument);
  CHECK(order.set_weight(2, -1.0).code() == StatusCode::kInvalidArgument);
  AdmissionQueue<FairOrder> queue({8, 1, 1'000'000}, order);
  std::uint64_t id = 1;
  std::map<std::uint64_t, TenantId> tenant_of;
  const auto submit = [&](TenantId tenant) {
    tenant_of[id] = tenant;
    REQUIRE(queue.submit({id++, tenant, 4}, 0.0).ok());
  };
  for (int i = 0; i < 1000; ++i) submit(1);
  for (int i = 0; i < 1000; ++i) submit(2);
  std::map<TenantId, int> served;
  for (int i = 0; i < 400; ++i) {
    const Admission out = queue.next(0.0);
    REQUIRE(out.kind == Kind::kAdmitted);
    ++served[tenant_of[out.request.id]];
    REQUIRE(queue.release(out.request.id));
  }
  CHECK(served[1] == 100);
  CHECK(served[2] == 300);
  submit(3);  // comes late, has used nothing: at most one round of the others goes first
  int before = 0;
  for (;; ++before) {
    const Admission out = queue.next(0.0);
    REQUIRE(queue.release(out.request.id));
    if (tenant_of[out.request.id] == 3) break;
  }
  CHECK(before <= 4);
}

TEST_CASE("a deadline that has passed is refused at once") {
  AdmissionQueue<> queue({10, 10, 10});
  CHECK(queue.submit({1, 0, 1, 5.0}, 5.0).code() == StatusCode::kCancelled);
  REQUIRE(queue.submit({1, 0, 1, 5.0}, 4.0).ok());
  CHECK(queue.next_deadline() == 5.0);
  CHECK(queue.next(4.5).kind == Kind::kAdmitted);
  CHECK(queue.next_deadline() == kNoDeadline);  // it has begun: the deadline is over
  CHECK(queue.next(6.0).kind == Kind::kNone);
  CHECK(blocks_at_most(100, 29, 16) == 9);
  CHECK(blocks_at_most(96, 0, 16) == 6);
}
