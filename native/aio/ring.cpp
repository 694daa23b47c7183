#include "aio/ring.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <system_error>
#include <thread>

namespace zcore {

namespace {

[[noreturn]] void fail(int error, const char* what) { throw std::system_error(error, std::generic_category(), what); }

std::atomic_ref<std::uint32_t> shared(std::uint32_t* word) { return std::atomic_ref<std::uint32_t>(*word); }

template <typename Type = std::uint32_t>
Type* inside(void* base, std::uint32_t offset) {
    return reinterpret_cast<Type*>(static_cast<std::byte*>(base) + offset);
}

}  // namespace

Ring::Mapping::~Mapping() {
    if (address != nullptr) {
        munmap(address, bytes);
    }
}

Ring::Descriptor::~Descriptor() {
    if (value >= 0) {
        close(value);
    }
}

Ring::Ring(unsigned entries) {
    io_uring_params params{};
    ring_.value = static_cast<int>(syscall(__NR_io_uring_setup, entries, &params));
    if (ring_.value < 0) {
        fail(errno, "io_uring_setup");
    }
    probe();
    map(submissions_, params.sq_off.array + params.sq_entries * sizeof(std::uint32_t), IORING_OFF_SQ_RING);
    map(completions_, params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe), IORING_OFF_CQ_RING);
    map(entries_, params.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
    sq_head_ = inside(submissions_.address, params.sq_off.head);
    sq_tail_ = inside(submissions_.address, params.sq_off.tail);
    sq_array_ = inside(submissions_.address, params.sq_off.array);
    sq_mask_ = *inside(submissions_.address, params.sq_off.ring_mask);
    cq_head_ = inside(completions_.address, params.cq_off.head);
    cq_tail_ = inside(completions_.address, params.cq_off.tail);
    cq_mask_ = *inside(completions_.address, params.cq_off.ring_mask);
    cqes_ = inside<io_uring_cqe>(completions_.address, params.cq_off.cqes);
}

Ring::~Ring() = default;

void Ring::map(Mapping& mapping, std::size_t bytes, std::uint64_t what) {
    void* const address = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, ring_.value,
                               static_cast<off_t>(what));
    if (address == MAP_FAILED) {
        fail(errno, "mmap of io_uring");
    }
    mapping.address = address;
    mapping.bytes = bytes;
}

void Ring::probe() const {
    constexpr std::size_t asked = IORING_OP_WRITE + 1;  // the last of those we use
    alignas(io_uring_probe) std::array<std::byte, sizeof(io_uring_probe) + asked * sizeof(io_uring_probe_op)> memory{};
    auto* const found = reinterpret_cast<io_uring_probe*>(memory.data());
    if (syscall(__NR_io_uring_register, ring_.value, IORING_REGISTER_PROBE, found, asked) < 0) {
        fail(errno, "io_uring_register(IORING_REGISTER_PROBE)");
    }
    const auto* const ops = reinterpret_cast<const io_uring_probe_op*>(memory.data() + sizeof(io_uring_probe));
    for (const unsigned op : {IORING_OP_POLL_ADD, IORING_OP_READ, IORING_OP_WRITE}) {
        if (op >= found->ops_len || (ops[op].flags & IO_URING_OP_SUPPORTED) == 0) {
            fail(EOPNOTSUPP, "io_uring without read, write and poll");
        }
    }
}

void Ring::push(const io_uring_sqe& entry) {
    const std::uint32_t tail = *sq_tail_, slot = tail & sq_mask_;  // only this thread writes it
    static_cast<io_uring_sqe*>(entries_.address)[slot] = entry;
    sq_array_[slot] = slot;
    shared(sq_tail_).store(tail + 1, std::memory_order_release);
}

void Ring::submit(Wait wait) {
    const std::uint32_t queued = *sq_tail_ - shared(sq_head_).load(std::memory_order_acquire);
    const unsigned least = wait == Wait::for_one ? 1 : 0, flags = wait == Wait::for_one ? IORING_ENTER_GETEVENTS : 0;
    if (queued == 0 && least == 0) {
        return;
    }
    if (syscall(__NR_io_uring_enter, ring_.value, queued, least, flags, nullptr, 0) >= 0 || errno == EINTR) {
        return;
    }
    if (errno == EAGAIN || errno == EBUSY || errno == ENOMEM) {  // what is queued stays queued; completions make room
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        return;
    }
    // Somebody closed our descriptor. The kernel may still write to the caller's memory, and nothing tells when it ends.
    std::fprintf(stderr, "zcore: io_uring_enter on descriptor %d: %s. Some code of this process closed it.\n",
                 ring_.value, std::strerror(errno));
    std::abort();
}

bool Ring::pop(io_uring_cqe& completion) {
    const std::uint32_t head = *cq_head_;  // only this thread writes it
    if (head == shared(cq_tail_).load(std::memory_order_acquire)) {
        return false;
    }
    completion = cqes_[head & cq_mask_];
    shared(cq_head_).store(head + 1, std::memory_order_release);
    return true;
}

}  // namespace zcore
