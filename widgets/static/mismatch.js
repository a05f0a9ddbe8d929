var t={render({el:e}){e.textContent=""}};export{t as default};
