// SPDX-License-Identifier: Apache-2.0
//
// fuzz/gguf_fuzz.cpp - any bytes as a GGUF file: parsed, and if that succeeds, everything it offers is used.
// Seeds: small files made with tests/examples/common/gguf_builder.hpp (every metadata type, every tensor
// type, one tiny model for each architecture).

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <common/gguf.hpp>
#include <common/gguf_source.hpp>

namespace {

using namespace prefillshare::examples;

void require(bool condition) {
  if (!condition) std::abort();
}

void use(const GgufValue& value) {
  require(!value.describe().empty());
  const bool array = value.type() == GgufType::kArray;
  require(!array || !value.as_number().has_value());
  if (const auto texts = value.as_strings()) {
    require(array && texts->size() == value.count());
    std::size_t bytes = 0;
    for (const std::string_view text : *texts) {
      for (const char c : text) bytes += static_cast<unsigned char>(c);
    }
    require(bytes < SIZE_MAX);
  }
  if (const auto numbers = value.as_integers()) require(array && numbers->size() == value.count());
  if (const auto numbers = value.as_numbers()) require(array && numbers->size() == value.count());
  if (const auto inner = value.as_arrays()) {
    require(array && inner->size() == value.count());
    for (const GgufValue& each : *inner) use(each);
  }
}

void use_model(GgufFile file) {
  const Result<std::unique_ptr<TensorSource>> source = GgufSource::from(std::move(file));
  if (!source.ok()) {
    require(!source.status().message().empty());
    return;
  }
  for (const std::string& name : (*source)->names()) {
    const Result<TensorInfo> info = (*source)->info(name);
    require(info.ok());
    std::vector<float> row(static_cast<std::size_t>(info->cols));
    require((*source)->read_rows(name, info->rows - 1, 1, row.data()).ok());
    require(!(*source)->read_rows(name, info->rows, 1, row.data()).ok());
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Result<GgufFile> file = GgufFile::parse(std::as_bytes(std::span(data, size)), "fuzz.gguf");
  if (!file.ok()) {
    require(!file.status().message().empty() && file.status().message().size() < 1000);
    return 0;
  }
  for (const GgufEntry& entry : file->metadata()) {
    require(file->find(entry.name) == &entry.value);
    use(entry.value);
  }
  for (const GgufTensor& tensor : file->tensors()) {
    require(file->find_tensor(tensor.name) == &tensor);
    std::vector<float> rows(static_cast<std::size_t>(tensor.row_elements() * tensor.rows()));
    const Status status = file->read_rows(tensor, 0, tensor.rows(), rows.data());
    require(status.ok() == (tensor.type->dequantize != nullptr));
  }
  use_model(*std::move(file));
  return 0;
}
