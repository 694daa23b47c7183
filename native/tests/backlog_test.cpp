// Whose block is next, and when a request is complete; no file is touched but to be opened.
#include "aio/backlog.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <string>
#include <utility>
#include <vector>

#include "tests/scratch.hpp"

namespace {

constexpr std::size_t block_bytes = 4096;

class Backlog : public testing::Test {
protected:
    std::shared_ptr<zcore::File> open(const std::string& name) const {
        return zcore::File::open(scratch.path(name), zcore::Access::create, zcore::Caching::page_cache);
    }

    std::shared_ptr<zcore::Request> add(const std::shared_ptr<zcore::File>& file, std::size_t blocks) {
        const zcore::Transfer transfer{file, zcore::Direction::read, 0, memory.data(), blocks * block_bytes};
        auto request = std::make_shared<zcore::Request>(transfer);
        backlog.add(request);
        return request;
    }

    zcore::Block take() {
        zcore::Block block;
        EXPECT_TRUE(backlog.take(block));
        return block;
    }

    bool is_empty() {
        zcore::Block block;
        return !backlog.take(block);
    }

    Scratch scratch;
    Pages memory{8 * block_bytes};
    zcore::Backlog backlog{block_bytes, false};
};

}  // namespace

TEST_F(Backlog, ServesEachFileInOrderAndFilesInTurns) {
    const auto a = open("a"), b = open("b"), c = open("c");
    const std::vector<std::shared_ptr<zcore::Request>> requests{add(a, 3), add(b, 1), add(a, 1), add(c, 2)};
    std::vector<std::size_t> order;
    for (zcore::Block block; backlog.take(block);) {
        order.push_back(static_cast<std::size_t>(std::find(requests.begin(), requests.end(), block.request) - requests.begin()));
    }
    EXPECT_EQ(order, (std::vector<std::size_t>{0, 1, 3, 0, 3, 0, 2}));
}

TEST_F(Backlog, CompletesARequestWithItsLastBlock) {
    const auto request = add(open("a"), 3);
    zcore::Block first = take(), second = take(), third = take();
    EXPECT_TRUE(is_empty());
    for (zcore::Block* const each : {&third, &first, &second}) {
        EXPECT_FALSE(request->is_done());
        EXPECT_FALSE(backlog.wait_idle_for({}));
        backlog.finish(*each, 0);
    }
    EXPECT_TRUE(request->is_done());
    EXPECT_TRUE(backlog.wait_idle_for({}));
    EXPECT_EQ(request->outcome().error, 0);
}

TEST_F(Backlog, BeginsNoMoreOfARequestThatFailedAndGoesOnWithOthers) {
    const auto a = open("a"), b = open("b");
    const auto fails = add(a, 8), follows = add(a, 1), beside = add(b, 1);
    zcore::Block first = take(), other = take(), second = take();
    EXPECT_EQ(other.request, beside);
    backlog.finish(second, EIO);
    EXPECT_FALSE(fails->is_done());  // its first block may still be written to
    zcore::Block next = take();
    EXPECT_EQ(next.request, follows);
    EXPECT_TRUE(is_empty());
    backlog.finish(first, ENOSPC);
    EXPECT_TRUE(fails->is_done());
    EXPECT_EQ(fails->outcome().error, ENOSPC);  // of two faults that nearest to the beginning
    EXPECT_EQ(fails->outcome().failed_offset, 0u);
    backlog.finish(next, 0);
    backlog.finish(other, 0);
    EXPECT_TRUE(follows->is_done() && beside->is_done());
    EXPECT_EQ(follows->outcome().error, 0);
    EXPECT_TRUE(backlog.wait_idle_for({}));
}

TEST_F(Backlog, GivesOutWhatItHasBeforeItEnds) {
    add(open("a"), 1);
    backlog.close();
    zcore::Block block;
    EXPECT_TRUE(backlog.wait_and_take(block));
    backlog.finish(block, 0);
    EXPECT_FALSE(backlog.wait_and_take(block));
}
