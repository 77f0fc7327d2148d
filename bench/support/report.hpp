// SPDX-License-Identifier: Apache-2.0
//
// bench/support/report.hpp - the rows of a suite and the JSON file that keeps them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/base/status.hpp>

#include "machine.hpp"

namespace codegemm::bench {

/// A file's name without its folder: results tell no paths of a machine.
[[nodiscard]] inline std::string file_name(const std::string& path) {
  return std::filesystem::path(path).filename().string();
}

/// A text and what was taken of it: sequences of tokens, all as long as the first.
[[nodiscard]] inline nlohmann::json text_json(const std::string& path,
                                              const std::vector<std::vector<std::int32_t>>& sequences) {
  return {{"name", file_name(path)},
          {"bytes", std::filesystem::file_size(path)},
          {"sequences", sequences.size()},
          {"length", sequences.front().size()}};
}

/// Another implementation, measured in the same run on the same problem.
struct Peer {
  std::string name;
  double median_us = 0.0;
  double ratio = 0.0;  // the peer's time over ours: more than 1 if we are faster
};

struct Row {
  std::string name;
  std::string shape;  // "NxK"
  std::string config;
  std::int64_t tokens = 0;
  double median_us = 0.0;
  double quarter_us = 0.0;  // a quarter of the calls took less; 0: not kept
  double three_quarters_us = 0.0;
  double gb_per_s = 0.0;       // bytes of the weights over the time
  double read_gb_per_s = 0.0;  // of a plain read in the same rounds; 0: not measured
  double share_of_read = 0.0;  // of what this machine reads from memory
  double error = 0.0;          // relative, against the reference
  double psumbook_us = 0.0;    // of building the Psumbook alone; 0: not measured
  double tflop_per_s = 0.0;    // 0: not counted
  std::vector<Peer> peers;
};

struct Suite {
  std::string name;
  nlohmann::json machine;
  MemorySpeed memory;
  std::vector<Row> rows;
};

/// The frame of every suite's results around rows of its own.
[[nodiscard]] inline nlohmann::json frame_json(const Suite& suite, nlohmann::json rows) {
  return {{"suite", suite.name},
          {"machine", suite.machine},
          {"commit", commit()},
          {"date", today()},
          {"copy_gb_per_s", suite.memory.copy_gb_per_s},
          {"read_gb_per_s", suite.memory.read_gb_per_s},
          {"rows", std::move(rows)}};
}

[[nodiscard]] inline nlohmann::json suite_json(const Suite& suite) {
  nlohmann::json rows = nlohmann::json::array();
  for (const Row& row : suite.rows) {
    nlohmann::json peers = nlohmann::json::array();
    for (const Peer& peer : row.peers) {
      peers.push_back({{"name", peer.name}, {"median_us", peer.median_us}, {"ratio", peer.ratio}});
    }
    rows.push_back({{"name", row.name},
                    {"shape", row.shape},
                    {"config", row.config},
                    {"tokens", row.tokens},
                    {"median_us", row.median_us},
                    {"gb_per_s", row.gb_per_s},
                    {"share_of_read", row.share_of_read},
                    {"error", row.error},
                    {"peers", peers}});
    if (row.quarter_us > 0.0) rows.back()["quartiles_us"] = {row.quarter_us, row.three_quarters_us};
    if (row.read_gb_per_s > 0.0) rows.back()["read_gb_per_s"] = row.read_gb_per_s;
    if (row.psumbook_us > 0.0) rows.back()["psumbook_us"] = row.psumbook_us;
    if (row.tflop_per_s > 0.0) rows.back()["tflop_per_s"] = row.tflop_per_s;
  }
  return frame_json(suite, std::move(rows));
}

/// Writes the file whole or not at all: beside it first, then over it.
[[nodiscard]] inline Status write_text(const std::string& text, const std::string& path) {
  const std::string beside = path + ".part";
  {
    std::ofstream file(beside, std::ios::trunc);
    file << text;
    file.flush();
    if (!file) {
      std::remove(beside.c_str());
      return error(StatusCode::kIoError, path, ": cannot be written");
    }
  }
  if (std::rename(beside.c_str(), path.c_str()) != 0) {
    std::remove(beside.c_str());
    return error(StatusCode::kIoError, path, ": cannot be replaced");
  }
  return {};
}

[[nodiscard]] inline Status write_json(const Suite& suite, const std::string& path) {
  return write_text(suite_json(suite).dump(2) + '\n', path);
}

}  // namespace codegemm::bench
