// A file opened for FileQueue: one descriptor past the page cache (O_DIRECT) where the file system lets it, and one
// through the page cache.
//
//     offset  0  100     4096          8192                               20480  20500
//                |head   |body: O_DIRECT, straight between device and memory|tail |
//                |buffered                                                  |buffered
//
// O_DIRECT asks that address, offset and length be multiples of `alignment()`. The body, which is, moves without a copy
// where memory lies as the file does (address = offset modulo alignment); else all of a request goes through the page
// cache. What is not aligned goes through the second descriptor rather than through a bounce buffer, since a write by
// way of a bounce buffer reads, changes and writes back a whole page: of two requests that write different bytes of one
// page one would be lost. `alignment()` is a page or more, so that no page is ever written both ways by requests that
// share no bytes. The kernel keeps both views coherent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace zcore {

enum class Access : std::uint8_t { read, update, create };  // create: made or cut to nothing, read and written
enum class Caching : std::uint8_t { page_cache, direct_if_possible, direct };

class File {
public:
    // Throws std::system_error: of open, or EINVAL where Caching::direct is asked for and refused.
    static std::shared_ptr<File> open(const std::string& path, Access access, Caching caching);
    ~File();
    File(const File&) = delete;
    File& operator=(const File&) = delete;

    const std::string& path() const { return path_; }
    bool is_direct() const { return direct_ >= 0; }
    const std::string& why_buffered() const { return why_buffered_; }  // empty where the file is direct
    std::size_t alignment() const { return alignment_; }               // bytes; 1 where the file is not direct

    // The descriptor that a transfer goes through, by the rule above.
    bool goes_direct(std::uintptr_t address, std::uint64_t offset, std::size_t bytes) const {
        return is_direct() && (address | offset | bytes) % alignment_ == 0;
    }
    int descriptor(bool direct) const { return direct ? direct_ : buffered_; }

    // All throw std::system_error.
    std::uint64_t size() const;                  // bytes
    void allocate(std::uint64_t bytes) const;    // reserves room for [0, bytes); the file is at least so long then
    void sync() const;                           // returns when all that is written is on the device

private:
    File() = default;

    std::string path_, why_buffered_;
    int buffered_ = -1, direct_ = -1;
    std::size_t alignment_ = 1;
};

}  // namespace zcore
