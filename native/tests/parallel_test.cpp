#include "zcore/parallel.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <numeric>
#include <thread>
#include <vector>

TEST(Parallel, VisitsEachElementOnce) {
    for (const std::size_t count : {0ul, 1ul, 7ul, 100ul, 1001ul}) {
        for (const int threads : {0, 1, 2, 5}) {
            std::vector<std::atomic<int>> visits(count);
            zcore::parallel_for(count, 10, threads, [&](std::size_t begin, std::size_t end) {
                for (; begin < end; ++begin) {
                    ++visits[begin];
                }
            });
            for (const auto& each : visits) {
                EXPECT_EQ(each, 1);
            }
        }
    }
}

TEST(Parallel, CutsWithoutRegardToThreads) {
    std::vector<std::size_t> cuts[2];
    for (const int threads : {1, 3}) {
        std::vector<std::atomic<std::size_t>> ends(10);
        zcore::parallel_for(95, 10, threads, [&](std::size_t begin, std::size_t end) { ends[begin / 10] = end; });
        cuts[threads > 1].assign(ends.begin(), ends.end());
    }
    EXPECT_EQ(cuts[0], cuts[1]);
}

// ThreadSanitizer would end a forked child that starts threads.
extern "C" const char* __tsan_default_options() { return "die_after_fork=0"; }

TEST(Parallel, ServesCallersAtATimeAndAForkedChild) {
    std::atomic<long> sum{0};
    auto add = [&] {
        for (int round = 0; round < 100; ++round) {
            zcore::parallel_for(100, 7, 2, [&](std::size_t begin, std::size_t end) { sum += static_cast<long>(end - begin); });
        }
    };
    std::thread first(add), second(add);
    first.join();
    second.join();
    EXPECT_EQ(sum, 20000);
    const pid_t child = fork();
    if (child == 0) {
        std::atomic<long> own{0};
        zcore::parallel_for(100, 7, 2, [&](std::size_t begin, std::size_t end) { own += static_cast<long>(end - begin); });
        _exit(own == 100 ? 0 : 1);
    }
    int status = -1;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
}
