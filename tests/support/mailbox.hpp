// SPDX-License-Identifier: Apache-2.0
//
// tests/support/mailbox.hpp - a message channel between "processes" that are objects of one test.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include <prefillshare/serve/wire.hpp>

namespace prefillshare::test {

/// The letters of all, and who is dead: what is sent to the dead stays, as with MPI, and nobody is told.
struct Mail {
  std::map<int, std::deque<std::pair<int, Message>>> boxes;  // by receiver: sender and message
  std::set<int> dead;
  std::int64_t sent = 0;
};

// [guide: channel]
class MailChannel {
 public:
  MailChannel(Mail& mail, int self) : mail_(&mail), self_(self) {}

  [[nodiscard]] Status send(int peer, Message message) {
    if (given_up_.contains(peer)) return {};
    ++mail_->sent;
    mail_->boxes[peer].emplace_back(self_, std::move(message));
    return {};
  }
  [[nodiscard]] Result<std::optional<int>> receive(Message& message) {
    auto& box = mail_->boxes[self_];
    while (!box.empty()) {
      const int from = box.front().first;
      message = std::move(box.front().second);
      box.pop_front();
      if (!given_up_.contains(from)) return std::optional<int>(from);
    }
    return std::optional<int>();
  }
  [[nodiscard]] std::int64_t queued_bytes(int peer) const {
    std::int64_t bytes = 0;
    for (const auto& [from, message] : mail_->boxes[peer]) {
      bytes += from == self_ ? std::ssize(message) : 0;
    }
    return bytes;
  }
  void give_up(int peer) { given_up_.insert(peer); }

 private:
  Mail* mail_;
  int self_;
  std::set<int> given_up_;
};
static_assert(MessageChannel<MailChannel>);
// [guide: end]

}  // namespace prefillshare::test
