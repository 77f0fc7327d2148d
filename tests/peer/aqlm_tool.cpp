// SPDX-License-Identifier: Apache-2.0
//
// tests/peer/aqlm_tool.cpp - writes, reads and converts quantized models, for aqlm_peer.py to compare.
// Usage: aqlm_tool write SOURCE FOLDER FORMAT SHARD_BYTES   quantizes the linear layers of a dense folder
//        aqlm_tool convert FOLDER OUT codegemm|aqlm
//        aqlm_tool dump FOLDER OUT.safetensors              every layer dequantized, NAME.weight in F64

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include <codegemm/io/model_checkpoint_writer.hpp>
#include <codegemm/quantize/kmeans.hpp>
#include <codegemm/reference.hpp>
#include <common/tensor_source.hpp>
#include <common/unwrap.hpp>

namespace {

using namespace codegemm;
using prefillshare::examples::check;
using prefillshare::examples::unwrap;

void write(const std::string& source_path, const std::string& folder, Format format, std::uint64_t shard) {
  const auto source = unwrap(prefillshare::examples::open_model(source_path));
  const SafetensorsFolder files = unwrap(SafetensorsFolder::open(source_path));
  SerialExecutor executor;
  std::vector<QuantizedMatrix> matrices;
  std::vector<std::string> names;
  std::vector<SafetensorsTensor> plain;
  for (const std::string& name : source->names()) {
    if (name.find("_proj.weight") == std::string::npos) {
      plain.push_back(*files.find(name)->tensor);
      continue;
    }
    const auto info = unwrap(source->info(name));
    std::vector<float> values(static_cast<std::size_t>(info.rows * info.cols));
    check(source->read_rows(name, 0, info.rows, values.data()));
    matrices.push_back(unwrap(
        quantize_kmeans(MatrixView<const float>(values.data(), info.rows, info.cols), format, {}, executor)));
    names.push_back(name.substr(0, name.rfind('.')));
  }
  std::vector<NamedMatrix> named;
  for (std::size_t i = 0; i < names.size(); ++i) named.push_back({names[i], matrices[i].view()});
  const MappedFile config = unwrap(open_json_file(source_path + "/config.json"));
  check(save_model_checkpoint(folder, CheckpointKind::kAqlm,
                              unwrap(parse_json_object(text_of(config), "config.json")), named, plain,
                              SaveModelOptions{shard}));
}

void dump(const std::string& folder, const std::string& path) {
  const ModelCheckpoint model = unwrap(ModelCheckpoint::open(folder));
  std::vector<std::vector<double>> weights;
  std::vector<SafetensorsTensor> tensors;
  weights.reserve(model.entries().size());
  for (const CheckpointEntry& entry : model.entries()) {
    const QuantizedMatrix matrix = unwrap(model.load(entry.name));
    weights.emplace_back(static_cast<std::size_t>(entry.rows * entry.cols));
    reference_dequantize(matrix.view(), MatrixView<double>(weights.back().data(), entry.rows, entry.cols));
    tensors.push_back({entry.name + ".weight",
                       Dtype::kF64,
                       {entry.rows, entry.cols},
                       std::as_bytes(std::span(weights.back()))});
  }
  check(write_safetensors(path, tensors));
}

int run(const std::vector<std::string>& args) {
  if (args.size() == 5 && args[0] == "write") {
    write(args[1], args[2], unwrap(parse_format(args[3])), std::strtoull(args[4].c_str(), nullptr, 10));
  } else if (args.size() == 4 && args[0] == "convert") {
    const auto kind = args[3] == "aqlm" ? CheckpointKind::kAqlm : CheckpointKind::kCodeGemm;
    check(convert_model_checkpoint(unwrap(ModelCheckpoint::open(args[1])), args[2], kind));
  } else if (args.size() == 3 && args[0] == "dump") {
    dump(args[1], args[2]);
  } else {
    std::fprintf(stderr, "usage: aqlm_tool write|convert|dump ... (see its source)\n");
    return 2;
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(std::vector<std::string>(argv + 1, argv + argc));
  } catch (const std::exception& e) {
    std::fprintf(stderr, "aqlm_tool: %s\n", e.what());
    return 2;
  }
}
