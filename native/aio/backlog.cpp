#include "aio/backlog.hpp"

#include <algorithm>
#include <utility>

#include "zcore/crc32c.hpp"

namespace zcore {

void Backlog::add(std::shared_ptr<Request> request) {
    if (request->transfer().bytes == 0) {
        request->complete();
        return;
    }
    {
        const std::lock_guard guard(mutex_);
        const File* const file = request->transfer().file.get();
        auto lane = std::find_if(lanes_.begin(), lanes_.end(), [&](const Lane& each) { return each.file == file; });
        if (lane == lanes_.end()) {
            lane = lanes_.insert(lane, Lane{file, {}});
        }
        lane->requests.push_back(std::move(request));
        ++unfinished_;
    }
    wake_.notify_all();
}

bool Backlog::cut(Block& block) {
    if (lanes_.empty()) {
        return false;
    }
    turn_ %= lanes_.size();
    Lane& lane = lanes_[turn_];
    const std::shared_ptr<Request>& request = lane.requests.front();
    const Transfer& transfer = request->transfer();
    std::byte* const address = transfer.address + request->handed_out_;
    const std::uint64_t offset = transfer.offset + request->handed_out_;
    const std::size_t bytes = cut_block(*transfer.file, reinterpret_cast<std::uintptr_t>(address), offset,
                                        transfer.bytes - request->handed_out_, block_bytes_);
    block = Block{.request = request, .address = address, .offset = offset, .bytes = bytes};
    ++request->blocks_under_way_;
    request->handed_out_ += bytes;
    ++turn_;
    if (request->handed_out_ == transfer.bytes) {
        leave_lane(*block.request);
    }
    return true;
}

void Backlog::leave_lane(const Request& request) {
    const File* const file = request.transfer().file.get();
    const auto lane = std::find_if(lanes_.begin(), lanes_.end(), [&](const Lane& each) { return each.file == file; });
    std::erase_if(lane->requests, [&](const auto& each) { return each.get() == &request; });
    if (lane->requests.empty()) {
        turn_ -= lane - lanes_.begin() < static_cast<std::ptrdiff_t>(turn_) ? 1 : 0;
        lanes_.erase(lane);
    }
}

// What is written is summed before it goes, while the blocks ahead of it are under way.
void Backlog::prepare(Block& block) const {
    if (checksum_ && !block.is_read()) {
        block.crc32c = crc32c({block.address, block.bytes});
    }
}

bool Backlog::take(Block& block) {
    {
        const std::lock_guard guard(mutex_);
        if (!cut(block)) {
            return false;
        }
    }
    prepare(block);
    return true;
}

bool Backlog::wait_and_take(Block& block) {
    {
        std::unique_lock guard(mutex_);
        wake_.wait(guard, [this] { return is_closed_ || !lanes_.empty(); });
        if (!cut(block)) {
            return false;
        }
    }
    prepare(block);
    return true;
}

void Backlog::finish(Block& block, int error) {
    const std::shared_ptr<Request> request = std::move(block.request);
    const Transfer& transfer = request->transfer();
    std::uint32_t part = 0;
    if (checksum_ && error == 0) {
        part = transfer.direction == Direction::read ? crc32c({block.address, block.bytes}) : block.crc32c;
        part = crc32c_shift(part, transfer.offset + transfer.bytes - block.offset - block.bytes);
    }
    const std::lock_guard guard(mutex_);
    Outcome& outcome = request->outcome_;
    outcome.crc32c ^= part;
    outcome.direct_bytes += block.moved_direct;
    const std::uint64_t failed_offset = block.offset + block.moved;
    if (error != 0) {
        if (outcome.error == 0 || failed_offset < outcome.failed_offset) {
            outcome.error = error;
            outcome.failed_offset = failed_offset;
        }
        if (request->handed_out_ < transfer.bytes) {
            request->handed_out_ = transfer.bytes;
            leave_lane(*request);
        }
    }
    if (--request->blocks_under_way_ == 0 && request->handed_out_ == transfer.bytes) {
        request->complete();
        if (--unfinished_ == 0) {
            idle_.notify_all();
        }
    }
}

void Backlog::close() {
    {
        const std::lock_guard guard(mutex_);
        is_closed_ = true;
    }
    wake_.notify_all();
}

bool Backlog::is_closed() const {
    const std::lock_guard guard(mutex_);
    return is_closed_;
}

bool Backlog::wait_idle_for(std::chrono::nanoseconds patience) const {
    std::unique_lock guard(mutex_);
    return idle_.wait_for(guard, patience, [this] { return unfinished_ == 0; });
}

void Backlog::wait_idle() const {
    std::unique_lock guard(mutex_);
    idle_.wait(guard, [this] { return unfinished_ == 0; });
}

}  // namespace zcore
