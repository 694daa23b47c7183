// CRC32C in memory, and whole files read and written with each backend, with and without checksums.
// Compare with fio on the same device and the same settings, in turns:
//   fio --name=read --filename=FILE --size=256M --rw=read --bs=1M --direct=1 --ioengine=io_uring --iodepth=32
#include <benchmark/benchmark.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "aio/crc32c_parts.hpp"
#include "tests/scratch.hpp"
#include "zcore/crc32c.hpp"
#include "zcore/file_queue.hpp"

namespace {

constexpr std::size_t file_bytes = 256 << 20;

void checksum(benchmark::State& state) {
    const Pages pages(static_cast<std::size_t>(state.range(0)), 7);
    for (auto _ : state) {
        benchmark::DoNotOptimize(zcore::crc32c({pages.data(), pages.size()}));
    }
    state.SetBytesProcessed(state.iterations() * state.range(0));
}
BENCHMARK(checksum)->Arg(4 << 10)->Arg(64 << 10)->Arg(1 << 20)->Arg(64 << 20);

void checksum_by_tables(benchmark::State& state) {
    const Pages pages(1 << 20, 7);
    for (auto _ : state) {
        benchmark::DoNotOptimize(zcore::detail::crc32c_by_tables(~0u, pages.data(), pages.size()));
    }
    state.SetBytesProcessed(state.iterations() << 20);
}
BENCHMARK(checksum_by_tables);

void transfer(benchmark::State& state, zcore::Direction direction, zcore::Backend backend) {
    const Scratch scratch;
    const auto file = zcore::File::open(scratch.path("file"), zcore::Access::create, zcore::Caching::direct_if_possible);
    file->allocate(file_bytes);
    Pages pages(file_bytes);
    std::memset(pages.data(), 7, file_bytes);
    const zcore::FileQueueOptions options{.queue_depth = static_cast<int>(state.range(0)),
                                          .block_bytes = static_cast<std::size_t>(state.range(1)),
                                          .backend = backend,
                                          .checksum = state.range(2) != 0};
    zcore::FileQueue queue(options);
    queue.submit({file, zcore::Direction::write, 0, pages.data(), file_bytes})->wait();  // so that there is what to read
    for (auto _ : state) {
        const auto request = queue.submit({file, direction, 0, pages.data(), file_bytes});
        request->wait();
        if (request->outcome().error != 0) {
            state.SkipWithError(std::strerror(request->outcome().error));
            break;
        }
    }
    state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(file_bytes));
    state.SetLabel(file->is_direct() ? "direct" : "page cache");
}

#define ZCORE_TRANSFER(name, direction, backend)                              \
    BENCHMARK_CAPTURE(transfer, name, direction, backend)                     \
        ->ArgNames({"depth", "block", "checksum"})                            \
        ->Args({8, 1 << 20, 0})                                               \
        ->Args({8, 1 << 20, 1})                                               \
        ->Args({32, 1 << 20, 0})                                              \
        ->UseRealTime()                                                       \
        ->MeasureProcessCPUTime()                                             \
        ->Unit(benchmark::kMillisecond)
ZCORE_TRANSFER(read_io_uring, zcore::Direction::read, zcore::Backend::io_uring);
ZCORE_TRANSFER(read_threads, zcore::Direction::read, zcore::Backend::threads);
ZCORE_TRANSFER(write_io_uring, zcore::Direction::write, zcore::Backend::io_uring);
ZCORE_TRANSFER(write_threads, zcore::Direction::write, zcore::Backend::threads);

}  // namespace
