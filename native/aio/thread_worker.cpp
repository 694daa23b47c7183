#include <unistd.h>

#include <cerrno>

#include "aio/worker.hpp"

namespace zcore {

namespace {

ssize_t move(const Block& block) {
    std::byte* const address = block.address + block.moved;
    const std::size_t bytes = block.bytes - block.moved;
    const auto offset = static_cast<off_t>(block.offset + block.moved);
    const ssize_t result = block.is_read() ? pread(block.descriptor(), address, bytes, offset)
                                           : pwrite(block.descriptor(), address, bytes, offset);
    return result < 0 ? -errno : result;
}

class ThreadWorker final : public Worker {
public:
    explicit ThreadWorker(Backlog& backlog) : backlog_(backlog) {}

    void run() override {
        for (Block block; backlog_.wait_and_take(block);) {
            Verdict verdict{Step::again};
            while (verdict.step == Step::again) {
                verdict = advance(block, move(block));
            }
            backlog_.finish(block, verdict.error);
        }
    }

    void wake() override {}  // it waits at the backlog itself

private:
    Backlog& backlog_;
};

}  // namespace

std::unique_ptr<Worker> make_thread_worker(Backlog& backlog) { return std::make_unique<ThreadWorker>(backlog); }

}  // namespace zcore
