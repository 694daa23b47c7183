// The requests of one queue: what is still to begin, cut into blocks for whichever worker asks, and what is under way.
//
//     lane of file A   [request 1: handed out up to here|......] [request 3]     first come, first served
//     lane of file B   [request 2]                                               lanes take turns, a block each
//
// A request is in a lane exactly while some of it is not handed out. It is complete when it is in no lane and none of
// its blocks is under way. Checksums are computed here, outside the lock, by the worker that asks or reports.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "aio/block.hpp"

namespace zcore {

class Backlog {
public:
    Backlog(std::size_t block_bytes, bool checksum) : block_bytes_(block_bytes), checksum_(checksum) {}

    bool sums() const { return checksum_; }
    void add(std::shared_ptr<Request> request);

    // The next block; false where there is none now.
    bool take(Block& block);
    // Waits for one; false when closed and there will be none.
    bool wait_and_take(Block& block);
    // Reports a block that was taken: error is 0, an errno, or end_of_file. Lets go of the request.
    void finish(Block& block, int error);

    void close();
    bool is_closed() const;
    bool wait_idle_for(std::chrono::nanoseconds patience) const;
    void wait_idle() const;

private:
    struct Lane {
        const File* file;
        std::deque<std::shared_ptr<Request>> requests;  // never empty
    };

    bool cut(Block& block);  // under the lock
    void leave_lane(const Request& request);
    void prepare(Block& block) const;

    const std::size_t block_bytes_;
    const bool checksum_;
    mutable std::mutex mutex_;  // guards all below
    mutable std::condition_variable wake_, idle_;
    std::vector<Lane> lanes_;
    std::size_t turn_ = 0;         // the lane to serve next
    std::size_t unfinished_ = 0;  // requests
    bool is_closed_ = false;
};

}  // namespace zcore
