# Where CUTLASS lies, a library of headers only: sets ZCORE_CUTLASS_HEADERS, or leaves it empty where there is none.
#   ZCORE_CUTLASS=AUTO     asks Python for its package nvidia-cutlass
#   ZCORE_CUTLASS=FOLDER   the folder `include` of a checkout of it
#   ZCORE_CUTLASS=OFF      none: built without the grouped products for NVIDIA GPUs
set(ZCORE_CUTLASS AUTO CACHE STRING "AUTO, OFF or a folder: the headers of CUTLASS")
set(ZCORE_CUTLASS_HEADERS "")
set(zcore_cutlass_version 4.2)  # whose interfaces cutlass/*.cuh are written for; pyproject.toml of the wheel pins it
if(ZCORE_CUTLASS STREQUAL "OFF")
  message(STATUS "Without CUTLASS: no grouped products for NVIDIA GPUs")
  return()
endif()

# Older compilers do not rewrite tensor maps on the device: their kernels for sm_90 would trap when they are launched.
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.3)
  if(NOT ZCORE_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "Grouped products for NVIDIA GPUs need CUDA 12.3 or newer, and this compiler is of "
                        "${CMAKE_CUDA_COMPILER_VERSION}. Build with a newer one, or without them: -DZCORE_CUTLASS=OFF.")
  endif()
  message(STATUS "CUDA ${CMAKE_CUDA_COMPILER_VERSION} is too old for CUTLASS: no grouped products for NVIDIA GPUs")
  return()
endif()

set(zcore_remedy "Install nvidia-cutlass==4.2.0.0 for the Python that CMake finds, name the headers with "
                 "-DZCORE_CUTLASS=FOLDER/include, or build without: -DZCORE_CUTLASS=OFF.")
if(ZCORE_CUTLASS STREQUAL "AUTO")
  find_package(Python 3.11 REQUIRED COMPONENTS Interpreter)
  # Found, not imported: the package imports much that headers do not need.
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "from importlib.util import find_spec; found = find_spec('cutlass_library'); \
print(found.submodule_search_locations[0] if found else '', end='')"
    OUTPUT_VARIABLE zcore_package COMMAND_ERROR_IS_FATAL ANY)
  if(NOT zcore_package)
    if(NOT ZCORE_CUDA STREQUAL "AUTO")
      message(FATAL_ERROR "ZCORE_CUDA=${ZCORE_CUDA} demands kernels for NVIDIA GPUs, and ${Python_EXECUTABLE} has no "
                          "package nvidia-cutlass, whose headers grouped products are made of. " ${zcore_remedy})
    endif()
    message(STATUS "No package nvidia-cutlass: built without the grouped products for NVIDIA GPUs")
    return()
  endif()
  set(zcore_folder ${zcore_package}/source/include)
else()
  set(zcore_folder ${ZCORE_CUTLASS})
endif()

if(NOT EXISTS ${zcore_folder}/cutlass/version.h)
  message(FATAL_ERROR "There is no cutlass/version.h in ${zcore_folder}. " ${zcore_remedy})
endif()
file(READ ${zcore_folder}/cutlass/version.h zcore_text)
string(REGEX MATCH "CUTLASS_MAJOR ([0-9]+)" _ "${zcore_text}")
set(zcore_found ${CMAKE_MATCH_1})
string(REGEX MATCH "CUTLASS_MINOR ([0-9]+)" _ "${zcore_text}")
set(zcore_found ${zcore_found}.${CMAKE_MATCH_1})
if(NOT zcore_found VERSION_EQUAL zcore_cutlass_version)
  message(FATAL_ERROR "CUTLASS in ${zcore_folder} is ${zcore_found}; expected ${zcore_cutlass_version}. "
                      ${zcore_remedy})
endif()
set(ZCORE_CUTLASS_HEADERS ${zcore_folder})
message(STATUS "CUTLASS ${zcore_found}: ${zcore_folder}")
