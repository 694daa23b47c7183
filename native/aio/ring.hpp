// An io_uring by its three system calls, for one thread; no liburing, which whoever builds from sources may not have.
//
//     submission queue   entries, filled here      --io_uring_enter-->  kernel
//     completion queue   (user_data, result)       <------------------  kernel
//
// The completion queue has twice the submission queue's entries, and the caller never has more operations under way than
// the latter: it cannot overflow. Neither buffers nor files are registered: memory comes and goes with requests, and
// pages pinned for long would count against the caller's limit of locked memory.
#pragma once

#include <linux/io_uring.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace zcore {

class Ring {
public:
    // Throws std::system_error where the kernel or its policy has no ring for us, or one without what we use (5.6).
    explicit Ring(unsigned entries);
    ~Ring();
    Ring(const Ring&) = delete;
    Ring& operator=(const Ring&) = delete;

    // Queues one operation; at most `entries` may be under way.
    void push(const io_uring_sqe& entry);

    enum class Wait : std::uint8_t { none, for_one };

    // Hands over what is queued. To wait is until something has completed, a signal came, or what is queued could not be
    // taken for the moment.
    void submit(Wait wait);

    // Takes one completion; false where there is none.
    bool pop(io_uring_cqe& completion);

private:
    struct Mapping {
        void* address = nullptr;
        std::size_t bytes = 0;
        ~Mapping();
    };
    struct Descriptor {
        int value = -1;
        ~Descriptor();
    };

    void map(Mapping& mapping, std::size_t bytes, std::uint64_t what);
    void probe() const;

    Descriptor ring_;
    Mapping submissions_, completions_, entries_;
    std::uint32_t *sq_head_, *sq_tail_, *sq_array_, *cq_head_, *cq_tail_;
    std::uint32_t sq_mask_ = 0, cq_mask_ = 0;
    io_uring_cqe* cqes_ = nullptr;
};

}  // namespace zcore
