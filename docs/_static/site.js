// What scrolls can be scrolled by the keyboard.
"use strict";
(() => {
  function mark() {
    for (const element of document.querySelectorAll(".highlight pre, .table-wrapper, div.math, .toc-scroll")) {
      if (element.scrollWidth > element.clientWidth || element.scrollHeight > element.clientHeight)
        element.tabIndex = 0;
      else element.removeAttribute("tabindex");
    }
  }
  window.addEventListener("load", mark);
  window.addEventListener("resize", mark);
})();
