// Reads and writes between memory and files, many at a time, behind the caller's back.
//
//     FileQueue queue({.queue_depth = 32, .block_bytes = 1 << 20});
//     auto request = queue.submit({file, Direction::read, offset, address, bytes});
//     ...
//     request->wait();
//     if (request->outcome().error != 0) ...
//
//     request   |head|block_bytes|block_bytes|...|tail|     cut where the file's alignment lets most of it go direct
//     under way       [ up to queue_depth blocks ]          of any requests, completing in any order
//
// Requests for one file begin in the order they came; files take turns, so that a tensor striped over several devices
// keeps all of them busy. A request ends when its last block does, well or with the fault nearest to its beginning; after
// a fault no more of its blocks begin. Requests that overlap while under way are the caller's race, as with threads.
//
// The caller keeps the memory alive until the request is done; the queue keeps the file open as long. To destroy the
// queue waits for all requests. A child made by fork has neither the threads nor the ring of its parent: submitting and
// waiting throw there, and destroying does nothing.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "zcore/file.hpp"

namespace zcore {

enum class Direction : std::uint8_t { read, write };
enum class Backend : std::uint8_t { automatic, io_uring, threads };

struct Transfer {
    std::shared_ptr<const File> file;
    Direction direction;
    std::uint64_t offset;  // bytes, in the file
    std::byte* address;    // only read where the direction is write
    std::size_t bytes;
};

constexpr int end_of_file = -1;  // an error that no errno tells: a read met the end of the file before its own

struct Outcome {
    int error = 0;                    // 0, an errno, or end_of_file
    std::uint64_t failed_offset = 0;  // bytes, in the file; what lies before may have moved or not
    std::uint64_t direct_bytes = 0;   // that went past the page cache, without a copy
    std::uint32_t crc32c = 0;         // of all bytes, where the queue computes it and there was no error
};

class Request {
public:
    explicit Request(const Transfer& transfer);

    const Transfer& transfer() const { return transfer_; }
    bool is_done() const { return is_done_.load(std::memory_order_acquire); }

    // True once done. Throws std::logic_error in a child made by fork after submission.
    bool wait_for(std::chrono::nanoseconds patience) const;
    void wait() const;

    const Outcome& outcome() const { return outcome_; }  // to be read when done

private:
    friend class Backlog;
    void complete();

    const Transfer transfer_;
    const int owner_;  // the process that submitted it
    std::atomic<bool> is_done_{false};
    mutable std::mutex mutex_;  // of the wait for is_done_
    mutable std::condition_variable done_;

    // Guarded by the backlog's mutex until done.
    std::size_t handed_out_ = 0;      // bytes that blocks were cut from
    std::size_t blocks_under_way_ = 0;
    Outcome outcome_;
};

struct FileQueueOptions {
    int queue_depth = 32;               // blocks under way at a time, 1 to 4096
    std::size_t block_bytes = 1 << 20;  // a multiple of the page size, up to 1 GiB
    int threads = 0;                    // 1 to 1024; 0: 1 for io_uring, which waits for many at a time, else 4
    Backend backend = Backend::automatic;
    bool checksum = false;  // CRC32C of each request, block by block while others are under way
};

class FileQueue {
public:
    // Throws std::invalid_argument for options out of range, std::system_error where io_uring is asked for and refused.
    explicit FileQueue(const FileQueueOptions& options);
    ~FileQueue();
    FileQueue(const FileQueue&) = delete;
    FileQueue& operator=(const FileQueue&) = delete;

    // What was resolved: backend and threads are never automatic here.
    const FileQueueOptions& options() const;
    const std::string& why_threads() const;  // why the system refused io_uring; empty where it was not asked or did not

    // Throws std::logic_error in a forked child, std::invalid_argument where block_bytes is no multiple of the file's
    // alignment or the offset is too large. Does not wait.
    std::shared_ptr<Request> submit(const Transfer& transfer);

    // Until no request is under way. Their faults are told by the requests.
    void wait_all() const;
    bool wait_all_for(std::chrono::nanoseconds patience) const;

private:
    struct Room;
    std::unique_ptr<Room> room_;
};

}  // namespace zcore
