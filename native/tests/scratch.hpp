// A folder for one test, gone with it; and memory that lies as O_DIRECT asks.
#pragma once

#include <stdlib.h>

#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>

class Scratch {
public:
    Scratch() {
        std::string name = (std::filesystem::temp_directory_path() / "zcore-XXXXXX").string();
        if (mkdtemp(name.data()) == nullptr) {
            throw std::runtime_error("mkdtemp failed for " + name);
        }
        folder_ = name;
    }
    ~Scratch() { std::filesystem::remove_all(folder_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    std::string path(const std::string& name) const { return (folder_ / name).string(); }

private:
    std::filesystem::path folder_;
};

class Pages {
public:
    explicit Pages(std::size_t bytes, unsigned seed = 0)
        : bytes_(bytes), data_(static_cast<std::byte*>(std::aligned_alloc(65536, (bytes / 65536 + 1) * 65536))) {
        std::mt19937 random(seed);
        for (std::size_t at = 0; at < bytes; ++at) {
            data_.get()[at] = seed == 0 ? std::byte{0} : static_cast<std::byte>(random());
        }
    }

    std::byte* data() const { return data_.get(); }
    std::size_t size() const { return bytes_; }

private:
    struct Free {
        void operator()(std::byte* memory) const { std::free(memory); }
    };
    std::size_t bytes_;
    std::unique_ptr<std::byte, Free> data_;
};
