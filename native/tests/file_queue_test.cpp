#include "zcore/file_queue.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <system_error>
#include <vector>

#include "tests/scratch.hpp"
#include "zcore/crc32c.hpp"

using zcore::Access;
using zcore::Backend;
using zcore::Caching;
using zcore::Direction;

namespace {

struct Way {
    Backend backend;
    Caching caching;
};

void PrintTo(const Way& way, std::ostream* out) {
    *out << (way.backend == Backend::io_uring ? "io_uring" : "threads")
         << (way.caching == Caching::page_cache ? "_page_cache" : "_direct");
}

class Queue : public testing::TestWithParam<Way> {
protected:
    void SetUp() override {
        if (GetParam().backend == Backend::io_uring) {
            try {
                zcore::FileQueue({.backend = Backend::io_uring});
            } catch (const std::system_error& error) {
                GTEST_SKIP() << error.what();
            }
        }
    }

    zcore::FileQueueOptions options(int depth = 4, std::size_t block_bytes = 65536, int threads = 2) const {
        return {depth, block_bytes, threads, GetParam().backend, true};
    }

    std::shared_ptr<zcore::File> open(const std::string& name, Access access) const {
        return zcore::File::open(scratch.path(name), access, GetParam().caching);
    }

    void write_plainly(const std::string& name, const Pages& pages) const {
        std::ofstream(scratch.path(name), std::ios::binary)
            .write(reinterpret_cast<const char*>(pages.data()), static_cast<std::streamsize>(pages.size()));
    }

    std::vector<char> read_plainly(const std::string& name) const {
        std::ifstream file(scratch.path(name), std::ios::binary);
        return {std::istreambuf_iterator<char>(file), {}};
    }

    Scratch scratch;
};

std::uint32_t checksum(const std::byte* data, std::size_t bytes) { return zcore::crc32c({data, bytes}); }

}  // namespace

INSTANTIATE_TEST_SUITE_P(Ways, Queue,
                         testing::Values(Way{Backend::io_uring, Caching::direct_if_possible},
                                         Way{Backend::io_uring, Caching::page_cache},
                                         Way{Backend::threads, Caching::direct_if_possible},
                                         Way{Backend::threads, Caching::page_cache}),
                         testing::PrintToStringParamName());

TEST_P(Queue, WritesAndReadsAnySizeFromAnyOffsetAndAddress) {
    zcore::FileQueue queue(options());
    const Pages source(400000, 7);
    for (const std::size_t bytes : {0ul, 1ul, 511ul, 4096ul, 65536ul, 65537ul, 300001ul}) {
        for (const std::size_t offset : {0ul, 1ul, 4096ul, 5000ul}) {
            for (const std::size_t shift : {0ul, 8ul, 904ul}) {
                const auto file = open("file", Access::create);
                const auto written = queue.submit({file, Direction::write, offset, source.data() + shift, bytes});
                written->wait();
                ASSERT_EQ(written->outcome().error, 0);
                ASSERT_EQ(written->outcome().crc32c, checksum(source.data() + shift, bytes));
                ASSERT_EQ(file->size(), bytes == 0 ? 0 : offset + bytes);
                Pages target(400000);
                const auto read = queue.submit({file, Direction::read, offset, target.data() + shift, bytes});
                read->wait();
                ASSERT_EQ(read->outcome().error, 0);
                ASSERT_EQ(read->outcome().crc32c, written->outcome().crc32c);
                ASSERT_TRUE(std::equal(source.data() + shift, source.data() + shift + bytes, target.data() + shift));
                ASSERT_EQ(target.data()[shift + bytes], std::byte{0});  // nothing behind is touched
            }
        }
    }
}

TEST_P(Queue, MovesWhatIsAlignedPastThePageCache) {
    zcore::FileQueue queue(options());
    const auto file = open("file", Access::create);
    if (!file->is_direct()) {
        GTEST_SKIP() << file->why_buffered();
    }
    const std::size_t page = file->alignment();
    const Pages source(20 * page, 7);
    const auto direct_bytes = [&](std::size_t offset, std::size_t shift, std::size_t bytes) {
        const auto request = queue.submit({file, Direction::write, offset, source.data() + shift, bytes});
        request->wait();
        EXPECT_EQ(request->outcome().error, 0);
        return request->outcome().direct_bytes;
    };
    EXPECT_EQ(direct_bytes(0, 0, 4 * page), 4 * page);
    EXPECT_EQ(direct_bytes(0, 0, 4 * page + 1), 4 * page);
    EXPECT_EQ(direct_bytes(100, 100, 4 * page), 3 * page);
    EXPECT_EQ(direct_bytes(100, 0, 4 * page), 0u);
}

TEST_P(Queue, ServesManyRequestsOfManyFiles) {
    constexpr std::size_t files = 3, parts = 200, part_bytes = 5000;
    const Pages source(files * parts * part_bytes, 7);
    Pages target(source.size());
    zcore::FileQueue queue(options(8, 4096, 3));
    std::vector<std::shared_ptr<zcore::File>> opened;
    for (std::size_t file = 0; file < files; ++file) {
        opened.push_back(open("file" + std::to_string(file), Access::create));
        opened.back()->allocate(parts * part_bytes);
    }
    for (const Direction direction : {Direction::write, Direction::read}) {
        std::byte* const memory = direction == Direction::write ? source.data() : target.data();
        std::vector<std::shared_ptr<zcore::Request>> requests;
        for (std::size_t at = 0; at < files * parts; ++at) {
            const std::size_t offset = at / files * part_bytes;
            requests.push_back(queue.submit({opened[at % files], direction, offset, memory + at * part_bytes, part_bytes}));
        }
        queue.wait_all();
        for (std::size_t at = 0; at < requests.size(); ++at) {
            ASSERT_TRUE(requests[at]->is_done());
            ASSERT_EQ(requests[at]->outcome().error, 0);
            ASSERT_EQ(requests[at]->outcome().crc32c, checksum(source.data() + at * part_bytes, part_bytes));
        }
    }
    EXPECT_TRUE(std::equal(source.data(), source.data() + source.size(), target.data()));
}

TEST_P(Queue, TellsWhereAFileEndsTooSoon) {
    const Pages source(100001, 7);
    write_plainly("file", source);
    const auto file = open("file", Access::read);
    Pages target(400000);
    zcore::FileQueue queue(options(4, 16384));
    const auto cut = queue.submit({file, Direction::read, 0, target.data(), 300000});
    const auto beyond = queue.submit({file, Direction::read, 200000, target.data(), 10});
    const auto whole = queue.submit({file, Direction::read, 0, target.data(), 100001});
    queue.wait_all();
    EXPECT_EQ(cut->outcome().error, zcore::end_of_file);
    EXPECT_EQ(cut->outcome().failed_offset, 100001u);
    EXPECT_EQ(beyond->outcome().error, zcore::end_of_file);
    EXPECT_EQ(beyond->outcome().failed_offset, 200000u);
    EXPECT_EQ(whole->outcome().error, 0);
}

TEST_P(Queue, TellsEachRequestItsOwnError) {
    Pages pages(65536 * 4, 7);
    write_plainly("file", pages);
    const auto closed = open("file", Access::read);
    const auto open_too = open("other", Access::create);
    zcore::FileQueue queue(options());
    const auto refused = queue.submit({closed, Direction::write, 0, pages.data(), pages.size()});
    const auto taken = queue.submit({open_too, Direction::write, 0, pages.data(), pages.size()});
    const auto wild = queue.submit({closed, Direction::read, 0, reinterpret_cast<std::byte*>(65536), 4096});
    queue.wait_all();
    EXPECT_EQ(refused->outcome().error, EBADF);
    EXPECT_EQ(refused->outcome().failed_offset, 0u);
    EXPECT_EQ(taken->outcome().error, 0);
    EXPECT_EQ(wild->outcome().error, EFAULT);
}

TEST_P(Queue, TellsThatADeviceIsFull) {
    const Pages pages(300000, 7);
    const auto file = zcore::File::open("/dev/full", Access::update, Caching::page_cache);
    zcore::FileQueue queue(options());
    const auto request = queue.submit({file, Direction::write, 0, pages.data(), pages.size()});
    request->wait();
    EXPECT_EQ(request->outcome().error, ENOSPC);
}

// In a child: a limit on the size of files fills the disk half way, and would end a process that took the signal.
TEST_P(Queue, TellsWhereAWriteStopsShort) {
    const pid_t child = fork();
    if (child == 0) {
        const rlimit limit{100000, 100000};
        setrlimit(RLIMIT_FSIZE, &limit);
        const Pages pages(300000, 7);
        const auto file = open("file", Access::create);
        zcore::FileQueue queue(options(4, 65536));
        const auto request = queue.submit({file, Direction::write, 0, pages.data(), pages.size()});
        request->wait();
        const zcore::Outcome outcome = request->outcome();
        _exit(outcome.error != EFBIG ? 1 : outcome.failed_offset < 65536 || outcome.failed_offset > 100000 ? 2 : 0);
    }
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
}

TEST_P(Queue, WaitsForAllWhenDestroyed) {
    const Pages source(1 << 20, 7);
    std::vector<std::shared_ptr<zcore::Request>> requests;
    {
        zcore::FileQueue queue(options(2, 4096));
        for (int each = 0; each < 4; ++each) {  // the files are closed here before they are written
            const auto file = open("file" + std::to_string(each), Access::create);
            requests.push_back(queue.submit({file, Direction::write, 0, source.data(), source.size()}));
        }
    }
    for (int each = 0; each < 4; ++each) {
        EXPECT_TRUE(requests[each]->is_done());
        EXPECT_EQ(requests[each]->outcome().error, 0);
        const std::vector<char> found = read_plainly("file" + std::to_string(each));
        ASSERT_EQ(found.size(), source.size());
        EXPECT_EQ(checksum(reinterpret_cast<const std::byte*>(found.data()), found.size()),
                  requests[each]->outcome().crc32c);
    }
}

TEST_P(Queue, IsRefusedInAForkedChildByName) {
    Pages pages(4096, 7);
    const auto file = open("file", Access::create);
    zcore::FileQueue queue(options());
    const zcore::Transfer transfer{file, Direction::write, 0, pages.data(), pages.size()};
    const auto done = queue.submit(transfer);
    queue.wait_all();
    const pid_t child = fork();
    if (child == 0) {
        int refusals = 0;
#if !defined(__SANITIZE_THREAD__)  // which follows no threads of a forked child
        zcore::FileQueue own(options());
        const auto request = own.submit(transfer);
        request->wait();
        refusals -= request->outcome().error == 0 ? 0 : 10;
#endif
        try {
            queue.submit(transfer);
        } catch (const std::logic_error& error) {
            refusals += std::string(error.what()).find("fork") != std::string::npos;
        }
        try {
            queue.wait_all();
        } catch (const std::logic_error&) {
            ++refusals;
        }
        queue.~FileQueue();
        _exit(refusals == 2 && done->wait_for({}) ? 0 : 1);
    }
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
    const auto later = queue.submit(transfer);
    later->wait();
    EXPECT_EQ(later->outcome().error, 0);
}

TEST_P(Queue, RefusesOptionsOutOfRange) {
    const auto refused = [&](int depth, std::size_t block_bytes, int threads) {
        EXPECT_THROW(zcore::FileQueue(options(depth, block_bytes, threads)), std::invalid_argument);
    };
    refused(0, 65536, 1);
    refused(5000, 65536, 1);
    refused(1, 0, 1);
    refused(1, 1000, 1);
    refused(1, 2ul << 30, 1);
    refused(1, 65536, -1);
    zcore::FileQueue queue(options(1, 65536, 9));
    EXPECT_EQ(queue.options().threads, 1);  // never more than blocks under way
    const auto file = open("file", Access::create);
    EXPECT_THROW(queue.submit({file, Direction::read, ~0ull, nullptr, 1}), std::invalid_argument);
}
