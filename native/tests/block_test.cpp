#include "aio/block.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <vector>

#include "tests/scratch.hpp"

namespace {

std::vector<std::size_t> cuts(const zcore::File& file, std::uintptr_t address, std::uint64_t offset, std::size_t bytes) {
    std::vector<std::size_t> made;
    while (bytes > 0) {
        made.push_back(zcore::cut_block(file, address, offset, bytes, 8192));
        address += made.back(), offset += made.back(), bytes -= made.back();
    }
    return made;
}

zcore::Block block_of(const std::shared_ptr<zcore::File>& file, zcore::Direction direction) {
    const zcore::Transfer transfer{file, direction, 0, nullptr, 8192};
    return {.request = std::make_shared<zcore::Request>(transfer), .address = nullptr, .offset = 0, .bytes = 8192};
}

}  // namespace

using Cuts = std::vector<std::size_t>;

TEST(Block, IsCutWhereTheMostGoesDirect) {
    const Scratch scratch;
    const auto file = zcore::File::open(scratch.path("file"), zcore::Access::create, zcore::Caching::direct_if_possible);
    if (!file->is_direct() || file->alignment() != 4096) {
        GTEST_SKIP() << "drawn for a file system with O_DIRECT and pages of 4096 bytes";
    }
    EXPECT_EQ(cuts(*file, 1 << 20, 0, 20000), (Cuts{8192, 8192, 3616}));
    EXPECT_EQ(cuts(*file, (1 << 20) + 100, 100, 20480), (Cuts{3996, 8192, 8192, 100}));
    EXPECT_EQ(cuts(*file, 1 << 20, 100, 20480), (Cuts{8192, 8192, 4096}));  // memory lies otherwise: all is buffered
    EXPECT_EQ(cuts(*file, (1 << 20) + 100, 100, 50), (Cuts{50}));
    EXPECT_EQ(cuts(*file, 1 << 20, 4096, 4096), (Cuts{4096}));
}

TEST(Block, OfAFileThroughThePageCacheIsCutEvenly) {
    const Scratch scratch;
    const auto file = zcore::File::open(scratch.path("file"), zcore::Access::create, zcore::Caching::page_cache);
    EXPECT_EQ(cuts(*file, 100, 100, 20480), (Cuts{8192, 8192, 4096}));
}

TEST(Block, GoesOnAfterLessThanAskedAndInterruptions) {
    const Scratch scratch;
    const auto file = zcore::File::open(scratch.path("file"), zcore::Access::create, zcore::Caching::page_cache);
    zcore::Block block = block_of(file, zcore::Direction::read);
    EXPECT_EQ(advance(block, -EINTR).step, zcore::Step::again);
    EXPECT_EQ(advance(block, -EAGAIN).step, zcore::Step::again);
    EXPECT_EQ(advance(block, 8191).step, zcore::Step::again);
    EXPECT_EQ(advance(block, 1).step, zcore::Step::done);
    EXPECT_EQ(block.moved, 8192u);
}

TEST(Block, FailsRatherThanGoOnForEver) {
    const Scratch scratch;
    const auto file = zcore::File::open(scratch.path("file"), zcore::Access::create, zcore::Caching::page_cache);
    zcore::Block reads = block_of(file, zcore::Direction::read), writes = block_of(file, zcore::Direction::write);
    EXPECT_EQ(advance(reads, 0).error, zcore::end_of_file);
    EXPECT_EQ(advance(writes, 0).error, EIO);
    EXPECT_EQ(advance(writes, -ENOSPC).error, ENOSPC);
    int rounds = 0;
    while (advance(reads, -EAGAIN).step == zcore::Step::again) {
        ASSERT_LT(++rounds, 10000);
    }
}
