#include "zcore/file_queue.hpp"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "aio/backlog.hpp"
#include "aio/worker.hpp"

namespace zcore {

Request::Request(const Transfer& transfer) : transfer_(transfer), owner_(getpid()) {}

bool Request::wait_for(std::chrono::nanoseconds patience) const {
    if (is_done()) {
        return true;
    }
    if (owner_ != getpid()) {
        throw std::logic_error("A request was waited for in a process forked after it was submitted, where it never ends.");
    }
    std::unique_lock guard(mutex_);
    return done_.wait_for(guard, patience, [this] { return is_done(); });
}

void Request::wait() const {
    while (!wait_for(std::chrono::hours(1))) {
    }
}

void Request::complete() {
    const std::lock_guard guard(mutex_);
    is_done_.store(true, std::memory_order_release);
    done_.notify_all();
}

namespace {

void check(const FileQueueOptions& options) {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    const auto refuse = [](const std::string& what, auto value, const std::string& expected) {
        throw std::invalid_argument(what + " is " + std::to_string(value) + "; expected " + expected + ".");
    };
    if (options.queue_depth < 1 || options.queue_depth > 4096) {
        refuse("queue_depth", options.queue_depth, "1 to 4096 blocks");
    }
    if (options.threads < 0 || options.threads > 1024) {
        refuse("threads", options.threads, "1 to 1024, or 0 for as many as the backend needs");
    }
    if (options.block_bytes == 0 || options.block_bytes % page != 0 || options.block_bytes > (1ul << 30)) {
        refuse("block_bytes", options.block_bytes, "a multiple of " + std::to_string(page) + " up to 1 GiB");
    }
}

// A thread that takes no signals: those of the process are for threads that know what to do with them, and a write past
// RLIMIT_FSIZE is to fail with EFBIG rather than end the process.
std::thread start(Worker& worker, std::size_t index) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
        std::thread thread([&worker] { worker.run(); });
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        pthread_setname_np(thread.native_handle(), ("zcore-file-" + std::to_string(index % 1000)).c_str());
        return thread;
    } catch (...) {
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
        throw;
    }
}

}  // namespace

// Workers and their threads, and the process that has them.
struct FileQueue::Room {
    FileQueueOptions options;
    std::string why_threads;
    Backlog backlog;
    std::vector<std::unique_ptr<Worker>> workers;
    std::vector<std::thread> threads;
    const pid_t owner = getpid();

    explicit Room(const FileQueueOptions& given) : options(given), backlog(given.block_bytes, given.checksum) {
        if (options.backend != Backend::threads) {
            try_rings();
        }
        if (workers.empty()) {
            options.backend = Backend::threads;
            options.threads = std::min(options.threads == 0 ? 4 : options.threads, options.queue_depth);
            for (int index = 0; index < options.threads; ++index) {
                workers.push_back(make_thread_worker(backlog));
            }
        }
        try {
            for (std::size_t index = 0; index < workers.size(); ++index) {
                threads.push_back(start(*workers[index], index));
            }
        } catch (...) {
            close();
            throw;
        }
    }

    ~Room() { close(); }

    void close() {
        backlog.close();
        wake();
        for (std::thread& each : threads) {
            each.join();
        }
        threads.clear();
    }

    void wake() {
        for (const auto& each : workers) {
            each->wake();
        }
    }

    // A ring for each thread, which share the depth. Where the system refuses the first it has none for us.
    void try_rings() {
        const int rings = std::min(std::max(options.threads, 1), options.queue_depth);
        try {
            for (int index = 0; index < rings; ++index) {
                const int more = index < options.queue_depth % rings ? 1 : 0;
                workers.push_back(make_ring_worker(backlog, options.queue_depth / rings + more));
            }
            options.backend = Backend::io_uring;
            options.threads = rings;
        } catch (const std::system_error& error) {
            if (options.backend == Backend::io_uring) {
                throw;
            }
            workers.clear();
            why_threads = error.what();
        }
    }
};

FileQueue::FileQueue(const FileQueueOptions& options) {
    check(options);
    room_ = std::make_unique<Room>(options);
}

FileQueue::~FileQueue() {
    if (room_->owner != getpid()) {
        static_cast<void>(room_.release());  // its threads are the parent's, and its locks may be held by them
    }
}

const FileQueueOptions& FileQueue::options() const { return room_->options; }

const std::string& FileQueue::why_threads() const { return room_->why_threads; }

std::shared_ptr<Request> FileQueue::submit(const Transfer& transfer) {
    if (room_->owner != getpid()) {
        throw std::logic_error("A queue of files was used in a forked process. Make one there, after the fork.");
    }
    constexpr auto last = static_cast<std::uint64_t>(std::numeric_limits<off_t>::max());
    if (transfer.offset > last || transfer.bytes > last - transfer.offset) {
        throw std::invalid_argument("A request for " + std::to_string(transfer.bytes) + " bytes at offset " +
                                    std::to_string(transfer.offset) + " ends past 2^63; no file is so long.");
    }
    if (room_->options.block_bytes % transfer.file->alignment() != 0) {
        throw std::invalid_argument("block_bytes is " + std::to_string(room_->options.block_bytes) + "; " +
                                    transfer.file->path() + " takes direct transfers in multiples of " +
                                    std::to_string(transfer.file->alignment()) + ". Use such a multiple.");
    }
    auto request = std::make_shared<Request>(transfer);
    room_->backlog.add(request);
    room_->wake();
    return request;
}

void FileQueue::wait_all() const {
    while (!wait_all_for(std::chrono::hours(1))) {
    }
}

bool FileQueue::wait_all_for(std::chrono::nanoseconds patience) const {
    if (room_->owner != getpid()) {
        throw std::logic_error("A queue of files was used in a forked process. Make one there, after the fork.");
    }
    return room_->backlog.wait_idle_for(patience);
}

}  // namespace zcore
