// A bundles.bin and a resident file on the real file system, made for one test.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "bundle/model_spec.h"
#include "device/checksum.h"

namespace weightd {

class TestFolder {
  public:
    TestFolder() {
        std::string pattern = (std::filesystem::current_path() / "test-XXXXXX").string();
        path_ = ::mkdtemp(pattern.data());
    }
    ~TestFolder() { std::filesystem::remove_all(path_); }
    std::string file(const std::string& name) const { return path_ + "/" + name; }

  private:
    std::string path_;
};

inline std::vector<std::byte> random_bytes(size_t count, uint64_t seed) {
    std::mt19937_64 random(seed);
    std::vector<std::byte> bytes(count);
    for (size_t i = 0; i + 8 <= count; i += 8) {
        const uint64_t word = random();
        std::memcpy(&bytes[i], &word, 8);
    }
    return bytes;
}

inline void write_file(const std::string& path, const std::vector<std::byte>& bytes) {
    std::ofstream file(path, std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    ASSERT_TRUE(file.good());
}

inline void flip_byte(const std::string& path, size_t offset) {
    std::fstream file(path, std::ios::binary | std::ios::in | std::ios::out);
    file.seekg(static_cast<std::streamoff>(offset));
    const char byte = static_cast<char>(file.get() ^ 0x40);
    file.seekp(static_cast<std::streamoff>(offset));
    file.put(byte);
}

// Layers of `neurons` bundles of 1000 bytes, four in a cell of 4096.
struct FlashModel {
    TestFolder folder;
    ModelSpec spec;
    std::vector<std::byte> bytes;
    std::vector<std::byte> resident;

    FlashModel(uint32_t layers, uint32_t neurons, const std::string& name = "model", uint32_t cell_bytes = 4096) {
        spec.name = name;
        spec.cell_bytes = cell_bytes;
        spec.stride_bytes = 1024;
        spec.bundle_bytes = 1000;
        spec.bundles_per_cell = cell_bytes / 1024;
        const uint32_t cells = (neurons + spec.bundles_per_cell - 1) / spec.bundles_per_cell;
        bytes = random_bytes(size_t{layers} * cells * cell_bytes, layers * 1000 + neurons);
        for (uint32_t layer = 0; layer < layers; layer++) {
            spec.layers.push_back(
                {uint64_t{layer} * cells * cell_bytes, neurons, cells, layer * cells, layer * neurons});
            for (uint32_t j = 0; j < neurons; j++) {
                spec.checksums.push_back(checksum({bytes.data() + offset(layer, j), spec.bundle_bytes}));
            }
        }
        resident = random_bytes(100'000, 7);
        spec.tensors = {{"a", 0, 50'000, checksum({resident.data(), 50'000})},
                        {"b", 50'000, 50'000, checksum({resident.data() + 50'000, 50'000})}};
        spec.bundles_path = folder.file("bundles.bin");
        spec.resident_path = folder.file("resident.safetensors");
        spec.resident_bytes = resident.size();
        write_file(spec.bundles_path, bytes);
        write_file(spec.resident_path, resident);
    }

    size_t offset(uint32_t layer, uint32_t neuron) const {
        return spec.layers[layer].offset_bytes + size_t{neuron / spec.bundles_per_cell} * spec.cell_bytes +
               size_t{neuron % spec.bundles_per_cell} * spec.stride_bytes;
    }
    const std::byte* cell(uint32_t layer, uint32_t index) const {
        return bytes.data() + spec.layers[layer].offset_bytes + size_t{index} * spec.cell_bytes;
    }
};

}  // namespace weightd
