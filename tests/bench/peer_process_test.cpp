// SPDX-License-Identifier: Apache-2.0

#include <cstdlib>
#include <string>
#include <vector>

#include <bench/support/peer_process.hpp>
#include <codegemm/io/temporary_folder.hpp>
#include <support/catch.hpp>

using namespace codegemm::bench;

namespace {

// Names the shell as the peers' Python and a folder with one script, as long as it lives.
class ShellPeer {
 public:
  explicit ShellPeer(const std::string& script) {
    codegemm::test::put_file(folder_ / "peer.sh", script);
    setenv("CODEGEMM_PEER_PYTHON", "/bin/sh", 1);
    setenv("CODEGEMM_PEER_SCRIPTS", folder_.path().c_str(), 1);
  }
  ShellPeer(const ShellPeer&) = delete;
  ShellPeer& operator=(const ShellPeer&) = delete;
  ~ShellPeer() {
    unsetenv("CODEGEMM_PEER_PYTHON");
    unsetenv("CODEGEMM_PEER_SCRIPTS");
  }

 private:
  codegemm::test::TemporaryFolder folder_;
};

}  // namespace

TEST_CASE("a peer answers as often as it is asked, beside others", "[peer]") {
  const ShellPeer shell("echo 1; while read n; do echo $n $((n * $1)); done\n");
  PeerServer twice("", "peer.sh", "2");
  PeerServer thrice("", "peer.sh", "3");
  REQUIRE(twice.ready());
  REQUIRE(thrice.ready());
  CHECK(twice.ask(5, 2) == std::vector<double>{5, 10});
  CHECK(thrice.ask(5, 2) == std::vector<double>{5, 15});
  CHECK(twice.ask(7, 2) == std::vector<double>{7, 14});
}

TEST_CASE("a peer that ends is not ready any more", "[peer]") {
  const ShellPeer shell("echo 1; read n; echo $n\n");
  PeerServer peer("", "peer.sh", "");
  REQUIRE(peer.ready());
  CHECK(peer.ask(5, 2) == std::vector<double>{5});
  CHECK_FALSE(peer.ready());
  CHECK(peer.ask(5, 2).empty());
}

TEST_CASE("a peer that fails at once, or is not installed, is never ready", "[peer]") {
  {
    const ShellPeer shell("exit 1\n");
    CHECK_FALSE(PeerServer("", "peer.sh", "").ready());
  }
  CHECK_FALSE(PeerServer("", "peer.sh", "").ready());
}
