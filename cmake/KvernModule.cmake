# One static library per folder of the house. A module names the modules of ours that it uses; the build refuses any
# other arrow (docs/decisions/0001-house.md), both for linking (here) and for #include (check_layers.py).
set(KVERN_ARROWS_base "")
set(KVERN_ARROWS_kernels base)
set(KVERN_ARROWS_transport base)
set(KVERN_ARROWS_store base kernels)
set(KVERN_ARROWS_plan base kernels store)
set(KVERN_ARROWS_service base kernels transport store)
set(KVERN_ARROWS_connector base kernels transport)
set(KVERN_ARROWS_kvernctl base kernels transport connector plan)
set(KVERN_ARROWS_python_shim base connector)

add_library(kvern_warnings INTERFACE)
target_compile_options(kvern_warnings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror -Wshadow -Wconversion -Wsign-conversion -Wnon-virtual-dtor>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<CXX_COMPILER_ID:GNU>>:-Wno-restrict>) # a false alarm of g++ 12 in std::string

function(kvern_module name)
  cmake_parse_arguments(ARG "" "" "SOURCES;USES;PUBLIC;PRIVATE" ${ARGN})
  foreach(used IN LISTS ARG_USES)
    if(NOT used IN_LIST KVERN_ARROWS_${name})
      message(FATAL_ERROR "${name} must not use ${used}: see KVERN_ARROWS_${name} in cmake/KvernModule.cmake")
    endif()
  endforeach()
  add_library(kvern_${name} STATIC ${ARG_SOURCES})
  add_library(kvern::${name} ALIAS kvern_${name})
  target_include_directories(kvern_${name} PUBLIC ${PROJECT_SOURCE_DIR} ${PROJECT_BINARY_DIR}/gen)
  foreach(used IN LISTS ARG_USES)
    target_link_libraries(kvern_${name} PUBLIC kvern_${used})
  endforeach()
  target_link_libraries(kvern_${name} PUBLIC ${ARG_PUBLIC} PRIVATE kvern_warnings ${ARG_PRIVATE})
  add_dependencies(kvern_${name} kvern_layers)
endfunction()

find_package(Python3 COMPONENTS Interpreter REQUIRED)
add_custom_target(kvern_layers ALL
  COMMAND ${Python3_EXECUTABLE} ${PROJECT_SOURCE_DIR}/cmake/check_layers.py ${PROJECT_SOURCE_DIR}
  COMMENT "Checking that includes follow the arrows of the house" VERBATIM)

# kvern_test(NAME base.keys SOURCES ... USES base ...): one GoogleTest binary, each case a ctest case labelled "unit".
function(kvern_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;USES;LABELS;LIBRARIES" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  foreach(used IN LISTS ARG_USES)
    target_link_libraries(${name} PRIVATE kvern::${used})
  endforeach()
  target_link_libraries(${name} PRIVATE kvern_warnings ${ARG_LIBRARIES} GTest::gmock GTest::gtest_main rapidcheck)
  gtest_discover_tests(${name} DISCOVERY_TIMEOUT 60 PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT ${ARG_TIMEOUT})
endfunction()
