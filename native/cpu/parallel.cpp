#include "zcore/parallel.hpp"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace zcore::detail {

namespace {

// One job at a time. Threads take pieces from a counter, so that one which the system holds up delays one piece.
struct Job {
    std::size_t count, grain, pieces;
    Piece piece;
    void* context;
    std::atomic<std::size_t> next{0};

    void work() {
        for (std::size_t each; (each = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) {
            piece(context, each * grain, std::min(count, (each + 1) * grain));
        }
    }
};

class Pool {
public:
    ~Pool() {
        {
            const std::lock_guard guard(mutex_);
            ends_ = true;
        }
        wake_.notify_all();
        for (std::thread& each : threads_) {
            each.join();
        }
    }

    // False where another thread runs a job: the caller then works alone.
    bool run(Job& job, int helpers) {
        const std::unique_lock turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) {
            return false;
        }
        {
            const std::lock_guard guard(mutex_);
            while (static_cast<int>(threads_.size()) < helpers) {
                threads_.emplace_back([this, index = static_cast<int>(threads_.size())] { serve(index); });
            }
            job_ = &job;
            helpers_ = helpers;
            pending_ = helpers;
            ++generation_;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock guard(mutex_);
        done_.wait(guard, [this] { return pending_ == 0; });
        job_ = nullptr;
        return true;
    }

private:
    void serve(int index) {
        std::uint64_t seen = 0;
        std::unique_lock guard(mutex_);
        for (;;) {
            wake_.wait(guard, [&] { return ends_ || (generation_ != seen && index < helpers_); });
            if (ends_) {
                return;
            }
            seen = generation_;
            Job* const job = job_;
            guard.unlock();
            job->work();
            guard.lock();
            if (--pending_ == 0) {
                done_.notify_one();
            }
        }
    }

    std::mutex turn_;  // held by whoever runs a job
    std::mutex mutex_;  // guards all below
    std::condition_variable wake_, done_;
    std::vector<std::thread> threads_;
    Job* job_ = nullptr;
    int helpers_ = 0, pending_ = 0;
    std::uint64_t generation_ = 0;
    bool ends_ = false;
};

// The pool of this process. A forked child has none of its parent's threads: it leaves the parent's pool be, and makes
// its own at first use.
Pool& pool() {
    static std::mutex mutex;
    static std::unique_ptr<Pool> current;
    static pid_t owner = 0;
    const std::lock_guard guard(mutex);
    if (owner != getpid()) {
        static_cast<void>(current.release());
        current = std::make_unique<Pool>();
        owner = getpid();
    }
    return *current;
}

}  // namespace

void run_in_parallel(std::size_t count, std::size_t grain, int threads, Piece piece, void* context) {
    Job job{count, grain, (count + grain - 1) / grain, piece, context};
    const int helpers = static_cast<int>(std::min<std::size_t>(job.pieces, static_cast<std::size_t>(std::max(threads, 1)))) - 1;
    if (helpers < 1 || !pool().run(job, helpers)) {
        job.work();
    }
}

}  // namespace zcore::detail
