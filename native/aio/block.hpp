// A block: the part of a request that one system call moves, or several where the kernel moves less than asked.
#pragma once

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "zcore/file_queue.hpp"

namespace zcore {

struct Block {
    std::shared_ptr<Request> request;
    std::byte* address = nullptr;
    std::uint64_t offset = 0;  // in the file
    std::size_t bytes = 0;
    std::size_t moved = 0;         // of bytes
    std::size_t moved_direct = 0;  // of moved
    std::uint32_t crc32c = 0;
    int refusals = 0;  // in a row, by a system for the moment without means (EAGAIN)
    bool is_refused_direct = false;

    bool is_read() const { return request->transfer().direction == Direction::read; }
    bool goes_direct() const {
        const auto at = reinterpret_cast<std::uintptr_t>(address + moved);
        return !is_refused_direct && request->transfer().file->goes_direct(at, offset + moved, bytes - moved);
    }
    int descriptor() const { return request->transfer().file->descriptor(goes_direct()); }
};

// How many of the `left` bytes at `address`, to lie at `offset`, make the next block. See file.hpp for what goes direct.
std::size_t cut_block(const File& file, std::uintptr_t address, std::uint64_t offset, std::size_t left,
                      std::size_t block_bytes);

enum class Step : std::uint8_t { again, done, failed };  // again: a system call for the rest

struct Verdict {
    Step step;
    int error = 0;
};

// What the result of a system call, bytes or the negative of an errno, makes of the block.
Verdict advance(Block& block, ssize_t result);

}  // namespace zcore
