#include "aio/block.hpp"

#include <algorithm>
#include <cerrno>

namespace zcore {

// A system without memory for a request may have it once others complete; one that never has it must not hang us.
constexpr int most_refusals = 1000;

std::size_t cut_block(const File& file, std::uintptr_t address, std::uint64_t offset, std::size_t left,
                      std::size_t block_bytes) {
    const std::size_t alignment = file.alignment();
    if (!file.is_direct() || (address - offset) % alignment != 0) {
        return std::min(left, block_bytes);
    }
    if (offset % alignment != 0) {
        return std::min<std::size_t>(left, alignment - offset % alignment);
    }
    const std::size_t whole = left - left % alignment;
    return whole != 0 ? std::min(whole, block_bytes) : left;
}

Verdict advance(Block& block, ssize_t result) {
    if (result == -EINTR) {
        return {Step::again};
    }
    if (result == -EAGAIN && ++block.refusals < most_refusals) {
        return {Step::again};
    }
    // The kernel cuts a write at a limit of the file's size and then finds it unaligned, or a file system asks for more
    // alignment than it says. The page cache takes the rest, or tells the true error; `direct_bytes` tells that it did.
    if (result == -EINVAL && block.goes_direct()) {
        block.is_refused_direct = true;
        return {Step::again};
    }
    if (result < 0) {
        return {Step::failed, static_cast<int>(-result)};
    }
    if (result == 0) {  // a write that moves nothing and says nothing would go on for ever
        return {Step::failed, block.is_read() ? end_of_file : EIO};
    }
    block.refusals = 0;
    const auto moved = static_cast<std::size_t>(result);
    block.moved_direct += block.goes_direct() ? moved : 0;
    block.moved += moved;
    return {block.moved == block.bytes ? Step::done : Step::again};
}

}  // namespace zcore
