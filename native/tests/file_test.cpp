#include "zcore/file.hpp"

#include <gtest/gtest.h>

#include <cerrno>
#include <filesystem>
#include <limits>
#include <system_error>

#include "tests/scratch.hpp"

using zcore::Access;
using zcore::Caching;
using zcore::File;

namespace {

template <typename Function>
int error_of(Function function) {
    try {
        function();
    } catch (const std::system_error& error) {
        return error.code().value();
    }
    return 0;
}

}  // namespace

TEST(File, SaysWhetherItIsDirect) {
    const Scratch scratch;
    const auto cached = File::open(scratch.path("file"), Access::create, Caching::page_cache);
    EXPECT_FALSE(cached->is_direct());
    EXPECT_EQ(cached->alignment(), 1u);
    EXPECT_NE(cached->why_buffered(), "");
    const auto file = File::open(scratch.path("file"), Access::update, Caching::direct_if_possible);
    EXPECT_EQ(file->is_direct(), file->why_buffered().empty());
    EXPECT_EQ(file->is_direct(), error_of([&] { File::open(scratch.path("file"), Access::read, Caching::direct); }) == 0);
}

TEST(File, WithoutODirectIsToldSo) {  // no file system of kernel objects has it
    const std::string path = "/proc/self/status";
    if (!std::filesystem::exists(path)) {
        GTEST_SKIP() << "no /proc here";
    }
    const auto file = File::open(path, Access::read, Caching::direct_if_possible);
    EXPECT_FALSE(file->is_direct());
    EXPECT_EQ(file->why_buffered(), "its file system has no O_DIRECT");
    EXPECT_EQ(error_of([&] { File::open(path, Access::read, Caching::direct); }), EINVAL);
}

TEST(File, IsMadeCutAndKeptAsItsAccessSays) {
    const Scratch scratch;
    const std::string path = scratch.path("file");
    EXPECT_EQ(error_of([&] { File::open(path, Access::read, Caching::page_cache); }), ENOENT);
    EXPECT_EQ(error_of([&] { File::open(path, Access::update, Caching::page_cache); }), ENOENT);
    File::open(path, Access::create, Caching::page_cache)->allocate(10000);
    EXPECT_EQ(File::open(path, Access::read, Caching::page_cache)->size(), 10000u);
    EXPECT_EQ(File::open(path, Access::update, Caching::direct_if_possible)->size(), 10000u);
    EXPECT_EQ(File::open(path, Access::create, Caching::direct_if_possible)->size(), 0u);
}

TEST(File, AllocatesRoomAndNeverShortens) {
    const Scratch scratch;
    const auto file = File::open(scratch.path("file"), Access::create, Caching::direct_if_possible);
    file->allocate(0);
    EXPECT_EQ(file->size(), 0u);
    file->allocate(123457);
    file->allocate(5);
    EXPECT_EQ(file->size(), 123457u);
    file->sync();
    const int error = error_of([&] { file->allocate(std::numeric_limits<std::int64_t>::max() - 4096); });
    EXPECT_TRUE(error == ENOSPC || error == EFBIG) << error;
}
