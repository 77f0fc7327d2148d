// SPDX-License-Identifier: Apache-2.0
//
// fuzz/safetensors_fuzz.cpp - any bytes as a safetensors file, as a checkpoint of ours, as a model of the
// CodeGEMM and AQLM projects (its config.json under "config" in the file's metadata), and as a config.json.
// Seeds: small files made with codegemm/io/safetensors_writer.hpp, codegemm/io/checkpoint.hpp and by Python.

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <codegemm/io/checkpoint.hpp>
#include <codegemm/io/model_checkpoint_writer.hpp>
#include <codegemm/io/safetensors.hpp>
#include <common/config_json.hpp>

namespace {

using codegemm::Checkpoint;
using codegemm::Result;
using codegemm::SafetensorsFile;

void require(bool condition) {
  if (!condition) std::abort();
}

void use_config(std::string_view text) {
  const auto has = [](std::string_view name) { return name.find("q_proj") != std::string_view::npos; };
  const Result<prefillshare::examples::ModelHyperparameters> h =
      prefillshare::examples::read_hyperparameters(text, "config.json", has);
  require(h.ok() || !h.status().message().empty());
  if (!h.ok()) return;
  require(h->heads > 0 && h->kv_heads > 0 && h->heads % h->kv_heads == 0);
  require(h->head_dim >= 2 && h->head_dim % 2 == 0 && h->rms_epsilon > 0.0 && h->rope_theta >= 1.0);
}

void use_checkpoint(SafetensorsFile file) {
  const Result<Checkpoint> checkpoint = Checkpoint::from(std::move(file));
  if (!checkpoint.ok()) {
    require(!checkpoint.status().message().empty());
    return;
  }
  for (const codegemm::CheckpointEntry& entry : checkpoint->entries()) {
    require(checkpoint->find(entry.name) == &entry);
    const Result<codegemm::QuantizedMatrix> matrix = checkpoint->load(entry.name);
    require(matrix.ok() ? matrix->rows() == entry.rows : !matrix.status().message().empty());
  }
}

/// What the converter of a model in either format does, without the files.
void use_model(SafetensorsFile file) {
  const std::string* text = file.find_metadata("config");
  if (text == nullptr) return;
  Result<nlohmann::json> config = codegemm::parse_json_object(*text, "config");
  require(config.ok() || !config.status().message().empty());
  if (!config.ok()) return;
  const Result<codegemm::ModelCheckpoint> model =
      codegemm::ModelCheckpoint::from(codegemm::SafetensorsFolder::of(std::move(file)), *std::move(config));
  require(model.ok() || !model.status().message().empty());
  if (!model.ok()) return;
  for (const codegemm::CheckpointEntry& entry : model->entries()) {
    require(model->find(entry.name) == &entry);
    const Result<codegemm::QuantizedMatrix> matrix = model->load(entry.name);
    require(matrix.ok() ? matrix->validate().ok() && matrix->cols() == entry.cols
                        : !matrix.status().message().empty());
    if (!matrix.ok()) continue;
    const Result<codegemm::QuantizedMatrix> row = codegemm::regroup(matrix->view(), -1);
    require(row.ok() || !row.status().message().empty());
    if (!row.ok() || model->kind() == codegemm::CheckpointKind::kCodeGemm) continue;
    const std::vector<std::byte> codes = codegemm::detail::aqlm_codes(matrix->view());
    Result<codegemm::QuantizedMatrix> again =
        codegemm::QuantizedMatrix::create(entry.format, entry.rows, entry.cols);
    require(again.ok());
    if (entry.format.b <= 8) codegemm::detail::unpack_aqlm_codes<std::int8_t>(codes, *again);
    if (entry.format.b > 8) codegemm::detail::unpack_aqlm_codes<std::int16_t>(codes, *again);
    require(std::equal(again->codes().begin(), again->codes().end(), matrix->codes().begin()));
  }
  require(model->plain_tensors().size() + 3 * model->entries().size() == model->files().tensors().size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  use_config({reinterpret_cast<const char*>(data), size});

  Result<SafetensorsFile> file =
      SafetensorsFile::parse(std::as_bytes(std::span(data, size)), "fuzz.safetensors");
  if (!file.ok()) {
    require(!file.status().message().empty());
    return 0;
  }
  std::uint64_t covered = 0;
  int sum = 0;
  for (const codegemm::SafetensorsTensor& tensor : file->tensors()) {
    require(file->find(tensor.name) == &tensor);
    require(static_cast<std::uint64_t>(tensor.elements()) * codegemm::item_size(tensor.dtype) ==
            tensor.data.size());
    covered += tensor.data.size();
    for (const std::byte byte : tensor.data) sum ^= std::to_integer<int>(byte);
  }
  require(covered < size && sum < 256);
  for (const codegemm::SafetensorsText& text : file->metadata())
    require(file->find_metadata(text.name) == &text.value);
  use_model(*SafetensorsFile::parse(std::as_bytes(std::span(data, size)), "fuzz.safetensors"));
  use_checkpoint(*std::move(file));
  return 0;
}
