// SPDX-License-Identifier: Apache-2.0
//
// Fuzzes what a decode process reads from other processes: first every reader for itself, then a whole
// server, to which the input is a conversation: Hello first, then messages of 2 + N bytes, N in the first
// two.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <utility>

#include <prefillshare/serve/decode_server.hpp>
#include <support/mailbox.hpp>
#include <support/tiny_model.hpp>

namespace {

using namespace prefillshare;
using test::Mail;
using test::MailChannel;

void read_all(std::span<const std::byte> bytes, const KvShape& shape) {
  static_cast<void>(message_kind(bytes).ok());
  static_cast<void>(read_hello(bytes).ok());
  static_cast<void>(read_ask(bytes).ok());
  static_cast<void>(read_grant(bytes).ok());
  static_cast<void>(read_pages(bytes, shape).ok());
  static_cast<void>(read_cancel(bytes).ok());
  static_cast<void>(read_token(bytes).ok());
  static_cast<void>(read_end(bytes).ok());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const auto model = test::random_model(test::tiny_config(), 1);
  const CacheKey key{"base", "1", ""};
  const std::span<const std::byte> bytes = std::as_bytes(std::span(data, size));
  const KvShape shape = kv_shape(model->config);
  read_all(bytes, shape);

  codegemm::SerialExecutor serial;
  HostKvStorage storage = HostKvStorage::create(shape, 8).value();
  const auto allocator = KvAllocator::create(storage).value();
  DecodeWorker worker(*allocator, storage, serial, 2);
  static_cast<void>(worker.add_module(factorize(model->config, model).value(), 2, 64).ok());
  Mail mail;
  MailChannel other(mail, 0);
  MailChannel own(mail, 1);
  DecodeServerOptions options;
  options.watch = {10, 20};
  DecodeServer<MailChannel> server(worker, *allocator, storage, own, model->config, key, options);
  Message message;
  write_message(HelloMessage{model->config, key, shape.block_tokens}, message);
  static_cast<void>(other.send(1, std::move(message)).ok());
  for (std::size_t at = 0; at + 2 <= bytes.size();) {
    const std::size_t wanted =
        static_cast<std::size_t>(data[at]) + 256 * static_cast<std::size_t>(data[at + 1]);
    const std::size_t count = std::min(wanted, bytes.size() - at - 2);
    const auto part = bytes.subspan(at + 2, count);
    static_cast<void>(other.send(1, Message(part.begin(), part.end())).ok());
    at += 2 + count;
  }
  const auto first_token = [](std::uint64_t, std::span<float>) { return 0; };
  for (KvTime now = 0; now < 100; ++now) {
    if (!server.step(now, first_token).ok()) std::abort();
  }
  // The other side is silent by now: whatever it asked for is given up.
  if (!server.idle() || allocator->stats().in_use_blocks != 0 || !allocator->check_invariants().ok())
    std::abort();
  return 0;
}
