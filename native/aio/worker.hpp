// A worker moves blocks of a backlog on a thread of its own until the backlog is closed and empty. There are two kinds.
#pragma once

#include <memory>

#include "aio/backlog.hpp"

namespace zcore {

class Worker {
public:
    virtual ~Worker() = default;
    virtual void run() = 0;
    virtual void wake() = 0;  // called, from any thread, when the backlog has got a request or was closed
};

// Has up to `depth` blocks under way at a time. Throws std::system_error where the system refuses.
std::unique_ptr<Worker> make_ring_worker(Backlog& backlog, int depth);

// Has one block under way, in pread or pwrite.
std::unique_ptr<Worker> make_thread_worker(Backlog& backlog);

}  // namespace zcore
