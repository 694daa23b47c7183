// The two ways to compute CRC32C, so that tests reach both. They take and give the register, not its complement.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zcore::detail {

std::uint32_t crc32c_by_tables(std::uint32_t state, const std::byte* data, std::size_t bytes);

#if defined(__x86_64__)
bool has_sse42();
std::uint32_t crc32c_by_sse42(std::uint32_t state, const std::byte* data, std::size_t bytes);
#endif

}  // namespace zcore::detail
