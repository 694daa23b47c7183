// A stream writes every word of what it is to write, and nothing beside it, whatever the lengths are.
#include "zcore/stream.hpp"

#include <gtest/gtest.h>

#include <vector>

TEST(Stream, WritesEveryWordAndNoOther) {
    for (const std::size_t count : {0, 1, 17, 1024, 70'001}) {
        std::vector<float> read(100'000, 1.0f), written(count + 2, 7.0f);
        const zcore::Words from{read.data(), read.size()}, to{written.data() + 1, count};
        zcore::stream({&from, 1}, {&to, 1}, 2);
        EXPECT_EQ(written.front(), 7.0f);
        EXPECT_EQ(written.back(), 7.0f);
        EXPECT_EQ(std::vector<float>(written.begin() + 1, written.end() - 1), std::vector<float>(count, 1.0f));
    }
}

TEST(Stream, WritesInPlace) {
    std::vector<float> values(5000, -1.0f);
    const zcore::Words both{values.data(), values.size()};
    zcore::stream({&both, 1}, {&both, 1}, 1);
    EXPECT_EQ(values, std::vector<float>(5000, 0.0f));
}
